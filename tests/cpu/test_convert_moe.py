"""Mixtures of experts as transformers writes them, and in either spelling of experts, come back bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mswift.converters.engine import convert
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable, table_for
from mswift.converters.tables.moe import SPELLINGS
from tests.support.checkpoints import read_model, read_region, same, write_model
from tests.support.family_configs import family_config
from tests.support.parity import model_of

FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "glm4_moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_wrote_comes_back(family: str, tmp_path: Path) -> None:
    model = model_of(family_config(family)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    convert(tmp_path / "m", tmp_path / "back", "hf")
    assert same(read_model(tmp_path / "back"), read_model(tmp_path / "hf"))
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_both_spellings_of_experts_are_one_megatron_model(family: str, tmp_path: Path) -> None:
    config = family_config(family)
    one = table_for(config)
    rng = np.random.default_rng(1)
    found = []
    for spelling in SPELLINGS:
        table = ModelTable(config, one.family, one.spec, spelling)
        if spelling == SPELLINGS[0]:
            tensors = {name: rng.integers(0, 2**16, shape, np.uint16) for name, shape in table.hf.items()}
        else:
            tensors = stacked(tensors, table)
        home = tmp_path / spelling
        write_model(home / "hf", config, tensors)
        convert(home / "hf", home / "m", "megatron")
        source = TorchDistSource(home / "m")
        regions = {key: Region.full(info.shape) for key, info in source.tensors.items()}
        found.append({key: read_region(source, key, r, np.dtype("<u2")) for key, r in regions.items()})
        convert(home / "m", home / "back", "hf")
        assert same(read_model(home / "back"), tensors)
    assert same(*found)


def stacked(tensors: dict[str, np.ndarray], table: ModelTable) -> dict[str, np.ndarray]:
    """The tensors of one-tensor-an-expert in the other spelling, stacked by hand."""
    out = {}
    for name, shape in table.hf.items():
        is_mixtral = table.family.model_type == "mixtral"
        block = name.rpartition("mlp.experts.")[0] + ("block_sparse_moe." if is_mixtral else "mlp.")
        each = block + "experts.{}.{}.weight"
        gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        if name.endswith("experts.gate_up_proj"):
            parts = [[tensors[each.format(e, half)] for half in (gate, up)] for e in range(shape[0])]
            out[name] = np.stack([np.concatenate(pair) for pair in parts])
        elif name.endswith("experts.down_proj"):
            out[name] = np.stack([tensors[each.format(e, down)] for e in range(shape[0])])
        else:
            out[name] = tensors.get(name, tensors.get(name.replace("mlp.gate.", "block_sparse_moe.gate.")))
    return out
