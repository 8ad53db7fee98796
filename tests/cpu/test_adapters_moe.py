"""Adapters of mixtures of experts: which tensors PEFT has for them, carried as they are.

transformers 5 stacks experts, so PEFT adapts parameters (`target_parameters`): A [rank * experts, in] and
B [out, rank * experts], gate and up as one of twice the rank, the router as well. Files that were written with
transformers 4 hold one LoRA for every expert's linear, which PEFT converts when it loads them.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mswift.converters.catalog import read_config
from mswift.converters.plan import table_for
from mswift.tuners import files
from mswift.tuners.merge import merge
from mswift.tuners.peft_config import peft_config, read_peft_config
from mswift.tuners.settings import PeftSettings
from mswift.tuners.shapes import adapter_table, promised_shapes
from tests.cpu.test_adapters_convert import FILE, convert, same_files
from tests.support.adapters import difference

PREFIX = "base_model.model."
V4_NAMES = [
    f"model.layers.{n}.{x}.lora_A.weight"
    for n in (0, 1)
    for x in ("mlp.experts.0.up_proj", "block_sparse_moe.experts.0.w1")
]
COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
}
GPT_OSS: dict[str, Any] = {"num_local_experts": 4, "head_dim": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    path = tmp_path_factory.mktemp("models")
    for name, sizes in (MODELS | {"gpt_oss": GPT_OSS}).items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **COMMON, **sizes))
        model.save_pretrained(path / name)
    return path


def base_of(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", experts_implementation="eager")


def peft_model(base: Path, adapter: Path, **settings: Any) -> Any:
    """PEFT's own adapter of these settings, random, saved to `adapter`."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base_of(base), config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.save_pretrained(adapter)
    return model


def promised(base: Path, adapter: Path) -> dict[str, tuple[int, ...]]:
    names = load_file(adapter / FILE) if (adapter / FILE).exists() else V4_NAMES
    own = adapter_table(table_for(read_config(base)), [name.removeprefix(PREFIX) for name in names])
    return promised_shapes(own, read_peft_config(adapter))


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_trains_as_many_parameters_as_peft_s(models: Path, tmp_path: Path, name: str) -> None:
    model = peft_model(models / name, tmp_path / "a", target_modules="all-linear")
    shapes = promised(models / name, tmp_path / "a")
    stored = {n.removeprefix(PREFIX): tuple(t.shape) for n, t in load_file(tmp_path / "a" / FILE).items()}
    assert shapes == stored
    assert sum(a * b for a, b in shapes.values()) == model.get_nb_trainable_parameters()[0]
    inner = any("mlp.experts.base_layer.lora_A" in n for n in shapes)  # gate_up_proj, inside the wrapper of down_proj
    router = any("mlp.gate.lora_B" in n for n in shapes)
    assert inner == router == (name != "qwen2_moe")  # PEFT 0.21.2 leaves the experts of that one out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["k_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
        },
    ],
)
def test_there_and_back(models: Path, tmp_path: Path, name: str, settings: Any) -> None:
    peft_model(models / name, tmp_path / "a", **settings)
    convert(tmp_path / "a", "megatron", tmp_path / "m")
    convert(tmp_path / "m", "hf", tmp_path / "b")
    same_files(tmp_path / "a", tmp_path / "b")


def of_transformers_4(base: Path, adapter: Path, targets: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A PEFT directory as transformers 4 made them: one LoRA for every linear of every expert. Its tensors."""
    config = peft_config(PeftSettings(rank=4, alpha=10.0, target_modules=targets), (), base_model=str(base), tied=False)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generator = torch.Generator().manual_seed(0)
    shapes = promised(base, adapter)
    tensors = {PREFIX + n: torch.randn(shape, generator=generator) * 0.1 for n, shape in sorted(shapes.items())}
    save_file(tensors, adapter / FILE, metadata={"format": "pt"})
    return tensors


V4 = {
    "qwen3_moe": (("q_proj", "gate_proj", "up_proj", "down_proj"), "mlp.experts.3.up_proj"),
    "mixtral": (("v_proj", "w1", "w2", "w3"), "block_sparse_moe.experts.3.w3"),
}


@pytest.mark.parametrize("name", V4)
def test_one_lora_an_expert(models: Path, tmp_path: Path, name: str) -> None:
    """Carried bit for bit; PEFT takes the names, and folds it into what mswift merge makes of it."""
    targets, linear = V4[name]
    tensors = of_transformers_4(models / name, tmp_path / "a", targets)
    assert tensors[f"{PREFIX}model.layers.1.{linear}.lora_A.weight"].shape == (4, 32)
    convert(tmp_path / "a", "megatron", tmp_path / "m")
    convert(tmp_path / "m", "hf", tmp_path / "b")
    same_files(tmp_path / "a", tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(base_of(models / name), str(tmp_path / "b")).merge_and_unload()
    merge(models / name, [tmp_path / "a"], tmp_path / "merged")
    ours = base_of(tmp_path / "merged").state_dict()
    untouched = base_of(models / name).state_dict()
    for key, weight in theirs.state_dict().items():
        assert difference(ours[key], weight) < 1e-6, key
    assert sum(not torch.equal(ours[key], untouched[key]) for key in ours) >= 6


ROUTERS_AND_EXPERTS = ("experts.gate_up_proj", "experts.down_proj", "gate.weight")
STACKED = {
    "qwen3_moe": {"target_modules": "all-linear"},
    "mixtral": {"target_modules": ["v_proj"], "target_parameters": [*ROUTERS_AND_EXPERTS]},
    "qwen2_moe": {"target_modules": ["v_proj"], "target_parameters": [*ROUTERS_AND_EXPERTS]},
    "gpt_oss": {
        "target_modules": ["o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "router.weight"],
        "alpha_pattern": {r".*\.experts\.gate_up_proj": 3},
    },
}


@pytest.mark.parametrize("block_bytes", [1 << 25, 500])
@pytest.mark.parametrize("name", STACKED)
def test_adapters_of_stacked_experts_merge_as_peft_s(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block_bytes: int
) -> None:
    """Into one weight an expert; of gpt-oss, whose files stack them, into [expert, in, out]."""
    monkeypatch.setattr(files, "BLOCK_BYTES", block_bytes)
    peft_model(models / name, tmp_path / "a", **STACKED[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(base_of(models / name), str(tmp_path / "a")).merge_and_unload()
    report = merge(models / name, [tmp_path / "a"], tmp_path / "merged")
    ours, untouched = (base_of(path).state_dict() for path in (tmp_path / "merged", models / name))
    changed = set()
    for key, weight in theirs.state_dict().items():
        assert difference(ours[key], weight) < 1e-6, key
        if not torch.equal(ours[key], untouched[key]):
            changed.add(key.rpartition("layers.")[2].partition(".")[2])
    assert {key for key in changed if "experts" in key} == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert any(key.endswith(("mlp.gate.weight", "mlp.router.weight")) for key in changed)
    assert report.num_folded > 4


def test_stacked_experts_have_no_fused_layout(models: Path, tmp_path: Path) -> None:
    peft_model(models / "qwen3_moe", tmp_path / "a", target_modules="all-linear")
    convert(tmp_path / "a", "megatron", tmp_path / "n", "--adapter_layout", "fused", status=2)
