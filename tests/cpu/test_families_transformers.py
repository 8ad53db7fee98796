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
    assert table.spec == table_for(family_config(family)).spec  # as transformers writes it, and as the hub has it
    assert written["architectures"] == [table.family.architecture]
    convert(source, there, "megatron")
    convert(there, back, "hf")
    found = {name: t for file in back.glob("*.safetensors") for name, t in load_file(file).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()


DEFAULTS = {"intermediate_size": 40, "num_hidden_layers": 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_our_default_of_an_absent_field_is_theirs(family: str) -> None:
    """A config.json with sizes and nothing else means the same model."""
    from transformers import AutoConfig

    given = {"model_type": family, "vocab_size": 103, "hidden_size": 128, "num_attention_heads": 64}
    assert table_for(given | DEFAULTS).spec == table_for(AutoConfig.for_model(**given, **DEFAULTS).to_dict()).spec
