"""Models of many families in vLLM: the gate's engines on a random model of each, experts and latent attention first.

Their sizes are those that vLLM's CPU build takes: heads of 32 and more, latent attention of 512 + 64, experts of
gpt-oss in multiples of 32.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mswift.cli.main import main
from mswift.errors import ConfigError
from mswift.handover.report import Comparison, compare
from mswift.handover.scoring import _engine
from mswift.infer.backends import EngineConfig, open_engine
from tests.support.commands import command, run
from tests.support.family_configs import family_config
from tests.support.parity import model_of
from tests.support.tiny import tiny_tokenizer
from tests.support.vllm import needs_vllm

pytestmark = needs_vllm
everything = pytest.mark.skipif(
    os.environ.get("MSWIFT_ALL_FAULTS") != "1", reason="takes minutes: MSWIFT_ALL_FAULTS=1 runs it"
)

SIZES: dict[str, Any] = {"vocab_size": 320, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 258}
HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
"""For families whose heads are a share of the hidden size."""
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
LATENT = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32, "v_head_dim": 32,
    "rope_scaling": {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.7} | YARN,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gpt_oss": HEADS
    | {"intermediate_size": 64, "swiglu_limit": 7.0, "rope_scaling": {"rope_type": "yarn", "truncate": False} | YARN},
    "granite": WIDE,
    "mixtral": WIDE,
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "olmo2": WIDE,
    "olmoe": WIDE | {"num_key_value_heads": 4},
    "phi3": WIDE | {"rope_scaling": None, "original_max_position_embeddings": 256},
    "qwen2": WIDE,
    "qwen2_moe": WIDE,
    "starcoder2": WIDE,
}
SOME = ("qwen3_moe", "deepseek_v3")
MORE = (
    "mixtral", "deepseek_v2", "qwen2_moe", "olmoe", "glm4_moe", "gpt_oss", "gemma", "gemma2", "gemma3_text", "glm",
    "glm4", "granite", "mistral", "qwen2", "phi3", "starcoder2", "olmo2",
    "mamba2",
)  # fmt: skip
"""Beside Llama and Qwen3, which other tests of vLLM have."""


def build(path: Path, family: str, **changes: Any) -> Path:
    """A random model of the family as transformers writes it, and a tokenizer."""
    model: Any = model_of(family_config(family, **(SIZES | OWN.get(family, HEADS) | changes)))
    model.save_pretrained(path)
    tiny_tokenizer(path)
    return path


def compared(models: dict[str, Path], num_rows: int = 4, length: int = 200) -> list[Comparison]:
    """transformers and vLLM on the same random tokens of each model, as the gate's processes ask them."""
    subjects = {name: {"model": str(path), "trained": str(path), "adapter": None} for name, path in models.items()}
    rows = np.random.default_rng(0).integers(0, 320, (num_rows, length)).tolist()
    scores = {}
    for engine in ("transformers", "vllm"):
        job = {"engine": engine, "device": "auto", "rows": rows, "subjects": subjects}
        found = _engine(job)
        scores |= {(name, engine): (found[f"{name} logprobs"], found[f"{name} argmax"]) for name in subjects}
    return compare(dict(sorted(scores.items(), key=lambda entry: list(models).index(entry[0][0]))))


@pytest.mark.parametrize("families", [SOME, pytest.param(MORE, marks=everything)], ids=["some", "more"])
def test_vllm_computes_what_transformers_does(tmp_path: Path, families: Sequence[str]) -> None:
    found = compared({family: build(tmp_path / family, family) for family in families})
    for each in found:
        print(f"{each.subject}: mean {each.mean:.1e}, max {each.max:.1e}, the same argmax {each.agreement:.2%}")
    assert [each.subject for each in found] == [*families]
    assert [each.subject for each in found if not each.passed or not 0 < each.max < 5e-5] == []


REFUSED = {
    "nemotron_h": ({"hybrid_override_pattern": "M-*EM"}, "is_act_and_mul=False is supported only for CUDA"),
    "qwen3_next": (
        {"linear_key_head_dim": 32, "linear_value_head_dim": 32},
        "builds of vLLM for the CPU compute them in bfloat16 only",
    ),
}


@everything
@pytest.mark.parametrize("family", REFUSED)
def test_what_a_cpu_build_cannot_do_is_said(tmp_path: Path, family: str) -> None:
    """Experts without a gate (Nemotron 3), and gated delta nets in float32."""
    changes, reason = REFUSED[family]
    model = build(tmp_path, family, **changes)
    with pytest.raises(ConfigError, match=reason):
        open_engine("vllm", EngineConfig(model, torch_dtype="float32"))


LORA = ("--tuner_type", "lora", "--lora_rank", "4", "--target_modules", "all-linear")
ENGINES = [("megatron", "transformers"), ("megatron", "vllm"), ("transformers", "vllm")]


@everything
@pytest.mark.parametrize(("family", "flags"), [("deepseek_v3", ()), ("qwen3_moe", LORA)], ids=["full", "lora"])
def test_what_was_trained_is_handed_over(tmp_path: Path, family: str, flags: Sequence[str]) -> None:
    """DeepSeek-V3 with the fields that transformers does not write; adapters of experts as the merged model."""
    changes = {"num_nextn_predict_layers": 0} if family == "deepseek_v3" else {}
    build(tmp_path / "model", family, **changes)
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 258}')
    rows = [{"query": f"say {n}", "response": "x" * (1 + n * 7 % 23) + str(n)} for n in range(20)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(command(tmp_path, "sft", tmp_path / "run", "--train_iters", "2", *flags))
    out = tmp_path / "out"
    assert main(["export", "--model", str(tmp_path / "run"), "--output_dir", str(out), "--to", "vllm"]) == 0
    report = json.loads((out / "handover.json").read_text())
    print((out / "handover.md").read_text())
    assert all(0 < each["max"] < 5e-5 for each in report["comparisons"])
    compared = {(each["subject"], *each["engines"]) for each in report["comparisons"]}
    if not flags:
        config = json.loads((out / "config.json").read_text())
        assert (config["topk_method"], config["scoring_func"]) == ("noaux_tc", "sigmoid")
        assert compared == {("model", *engines) for engines in ENGINES}
        assert (out / "serve.sh").exists()
        return
    (note,) = report["notes"]
    assert "vLLM does not serve it: it adapts experts" in note
    assert "mswift merge --model BASE" in note
    assert ("adapter", "megatron", "transformers") in compared
    assert {("merged", *engines) for engines in ENGINES} <= compared
    assert not (out / "serve.sh").exists()
