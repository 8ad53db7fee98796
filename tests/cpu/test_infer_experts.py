"""Adapters of experts while answering: PEFT's log-probabilities, stacked or one an expert, side by side, merged."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mswift.converters.catalog import read_config
from mswift.errors import CheckpointError, ConfigError
from mswift.infer.backends import EngineConfig, open_engine
from mswift.infer.request import BASE_MODEL, Engine, Request, Sampling
from mswift.infer.vllm_adapters import check_vllm_adapter, lora_options
from mswift.tuners.merge import merge
from tests.cpu.test_adapters_moe import of_transformers_4
from tests.support.adapters import load_peft, random_adapter
from tests.support.tiny import tiny_model, tiny_tokenizer

PAIRS = [([1, 2, 3], [4, 5, 6, 7]), ([9], [8, 250, 3])]
EACH = ("q_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE; adapters of all its linears, experts and routers: two of this day, one of transformers 4."""
    path = tmp_path_factory.mktemp("experts")
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    tiny_model(path / "model", "qwen3_moe", vocab_size=259, use_cache=True, **sizes)
    tiny_tokenizer(path / "model")
    for seed, name in enumerate(("one", "two")):
        random_adapter(path / name, path / "model", seed=seed)
    of_transformers_4(path / "model", path / "each", EACH)
    return path


def scores(engine: Engine, adapter: str) -> list[float]:
    return [token.logprob for score in engine.score(PAIRS, adapter) for token in score.tokens]


def of_peft(home: Path, adapter: str) -> list[float]:
    model = load_peft(home / "model", home / adapter)
    found: list[float] = []
    for prompt, continuation in PAIRS:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *continuation]])).logits[0].log_softmax(-1)
        found += [float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(continuation)]
    return found


def opened(home: Path, names: Sequence[str]) -> Engine:
    return open_engine("transformers", EngineConfig(home / "model", {name: home / name for name in names}))


@pytest.mark.parametrize("names", [("one", "two"), ("each",)])
def test_scores_are_peft_s_and_the_base_s_beside_them(home: Path, names: Sequence[str]) -> None:
    engine, plain = opened(home, names), opened(home, ())
    base = scores(plain, BASE_MODEL)
    for name in (*names, *reversed(names)):
        expected = of_peft(home, name)
        assert scores(engine, name) == pytest.approx(expected, abs=2e-6)
        assert scores(engine, BASE_MODEL) == base
        assert max(abs(a - b) for a, b in zip(expected, base, strict=True)) > 0.1
    asked = [
        Request(prompt="Hello", adapter=name, sampling=Sampling(max_new_tokens=6)) for name in (BASE_MODEL, *names)
    ]
    together = [answer.token_ids for answer in engine.generate(asked)]
    assert together == [engine.generate([request])[0].token_ids for request in asked]
    assert together[0] == plain.generate(asked[:1])[0].token_ids


@pytest.mark.parametrize("name", ["one", "each"])
def test_vllm_names_the_merge_which_gives_the_same_scores(home: Path, name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vLLM does not serve it: it adapts experts .*mswift merge --model BASE"):
        check_vllm_adapter(home / name)
    merge(home / "model", [home / name], tmp_path / "merged")
    merged = open_engine("transformers", EngineConfig(tmp_path / "merged"))
    assert scores(merged, BASE_MODEL) == pytest.approx(of_peft(home, name), abs=5e-6)


def test_what_peft_would_leave_out_in_silence_is_refused(home: Path, tmp_path: Path) -> None:
    """PEFT warns, and gives an adapter that does nothing."""
    of_transformers_4(home / "model", tmp_path / "gate_up", ("gate_proj", "up_proj"))
    with pytest.raises(CheckpointError, match=r"4 tensors stay empty, .*experts\.lora_A.* mswift merge --model"):
        open_engine("transformers", EngineConfig(home / "model", {"gate_up": tmp_path / "gate_up"}))
    merge(home / "model", [tmp_path / "gate_up"], tmp_path / "merged")


def test_a_cpu_build_of_vllm_has_no_adapters_beside_experts(home: Path, tmp_path: Path) -> None:
    """Not even of attention alone; a build for GPUs is asked."""
    random_adapter(tmp_path / "attention", home / "model", ("q_proj", "o_proj"))
    adapters, base = {"attention": tmp_path / "attention"}, read_config(home / "model")
    with pytest.raises(ConfigError, match=r"builds for the CPU have no adapters on models with experts.*mswift merge"):
        lora_options(adapters, base, on_cpu=True)
    assert lora_options(adapters, base, on_cpu=False) == {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
    assert lora_options({}, base, on_cpu=True) == {}


def test_what_vllm_would_leave_out_of_latent_attention_is_refused(home: Path, tmp_path: Path) -> None:
    tensors = load_file(home / "one" / "adapter_model.safetensors")
    queries = {name: tensor for name, tensor in tensors.items() if ".q_proj." in name}
    for leaf, refused in (("q_b_proj", False), ("kv_b_proj", True)):
        path = Path(shutil.copytree(home / "one", tmp_path / leaf))
        renamed = {name.replace("q_proj", leaf): tensor for name, tensor in queries.items()}
        save_file(renamed, path / "adapter_model.safetensors")
        if refused:
            with pytest.raises(ConfigError, match=r"it adapts \S*self_attn.kv_b_proj, which .* without adapters"):
                check_vllm_adapter(path)
        else:
            check_vllm_adapter(path)


def test_a_limit_that_vllm_does_not_read_is_refused(tmp_path: Path) -> None:
    from mswift.infer.vllm_options import vllm_options

    fields = {"model_type": "gpt_oss", "num_local_experts": 4}
    config = EngineConfig(tmp_path, torch_dtype="float32")
    for limit, refused in ((7.0, False), (1.5, True)):
        (tmp_path / "config.json").write_text(json.dumps(fields | {"swiglu_limit": limit}))
        if refused:
            with pytest.raises(ConfigError, match=r"swiglu_limit is 1\.5, and vLLM does not read it: .* with 7\.0"):
                vllm_options(config, "0.32.0")
        else:
            assert vllm_options(config, "0.32.0")["dtype"] == "float32"


def test_limits_of_time_steps_are_refused_for_vllm(tmp_path: Path) -> None:
    from mswift.infer.vllm_options import vllm_options

    config = EngineConfig(tmp_path, torch_dtype="float32")
    no_limit = [{}, *({"time_step_limit": [0.0, end]} for end in (float("inf"), {"__float__": "Infinity"}))]
    for fields in no_limit:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba2"} | fields))
        assert vllm_options(config, "0.32.0")["dtype"] == "float32"
    (tmp_path / "config.json").write_text('{"model_type": "mamba2", "time_step_limit": [0.0, 0.05]}')
    with pytest.raises(ConfigError, match=r"time_step_limit is \[0.0, 0.05\], and vLLM does not read it"):
        vllm_options(config, "0.32.0")


def test_groups_that_vllm_normalises_by_themselves_do_not_pass_the_gate(tmp_path: Path) -> None:
    """tests/system/test_vllm_families.py: they differ by 1.4, and a model of one group does not."""
    from mswift.handover.files import file_problems

    for fields, refused in (({"n_groups": 4}, 4), ({}, 8), ({"n_groups": 1}, None)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba2"} | fields))
        found = [problem for problem in file_problems(tmp_path, None, chats=False) if "n_groups" in problem]
        if refused is None:
            assert found == []
        else:
            assert found[0].startswith(f"config.json: n_groups is {refused}: vLLM (as mamba_ssm) normalises each group")
