"""Every family against transformers: names and shapes, both spellings of config.json, files there and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mswift.converters.engine import convert
from mswift.converters.plan import table_for
from tests.support.family_configs import FAMILY_CONFIGS, REMOTE_CODE, family_config
from tests.support.parity import model_of

FAMILIES = sorted(FAMILY_CONFIGS.keys() - REMOTE_CODE)


def saved(family: str, path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Writes a tiny model as transformers does; its tensors."""
    config = family_config(family, **changes)
    model: Any = model_of(config)
    model.save_pretrained(path, max_shard_size="20KB")
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family: str, tmp_path: Path) -> None:
    source, there, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    tensors = saved(family, source)
    written = json.loads((source / "config.json").read_text())
    table = table_for(written, tensors)
    assert dict(table.hf) == {name: tuple(t.shape) for name, t in tensors.items()}
    as_published = table_for(family_config(family), tensors).spec
    assert table.spec == as_published  # as transformers writes it, and as the hub has it
    assert written["architectures"] == [table.family.architecture]
    convert(source, there, "megatron")
    convert(there, back, "hf")
    found = {name: t for file in back.glob("*.safetensors") for name, t in load_file(file).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()


SIZES: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 64, "intermediate_size": 40, "num_hidden_layers": 3}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
OTHER_SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v2": SIZES | {"num_experts_per_tok": 2},
    "deepseek_v3": SIZES | {"num_key_value_heads": 64},
    "glm4_moe": SIZES | {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": SIZES
    | {"rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}},
    "mamba2": {"hidden_size": 256, "num_hidden_layers": 3, "num_heads": 8},
    "nemotron_h": {"hidden_size": 128, "num_attention_heads": 64, "hybrid_override_pattern": "M*-E"},
    "qwen2_moe": SIZES | EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3_moe": SIZES | EXPERTS,
}
"""Sizes, and fields whose defaults in transformers mean no model, or none with these sizes."""


@pytest.mark.parametrize("family", FAMILIES)
def test_our_default_of_an_absent_field_is_theirs(family: str) -> None:
    """A config.json with sizes and nothing else means the same model."""
    from transformers import AutoConfig

    given = {"model_type": family, "vocab_size": 103} | OTHER_SIZES.get(family, SIZES)
    assert table_for(given).spec == table_for(AutoConfig.for_model(**given).to_dict()).spec
