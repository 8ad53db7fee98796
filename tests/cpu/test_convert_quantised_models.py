"""Quantised checkpoints of the families that are published so: transformers dequantises them to the same bits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mswift.converters.engine import convert
from mswift.converters.reader import WeightReader
from mswift.converters.verify import verify
from mswift.errors import CheckpointError
from tests.support.family_configs import FAMILY_CONFIGS

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [4, 2]}
GPT_OSS = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}


def tiny(kind: str, path: Path, **changes: Any) -> dict[str, Tensor]:
    """A model of transformers in a directory, BF16; its tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(FAMILY_CONFIGS[kind] | changes))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return load_file(path / "model.safetensors")


def quantised(path: Path, tensors: dict[str, Tensor], how: dict[str, Any]) -> None:
    """Puts quantised tensors in the place of the model's."""
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {"quantization_config": how}
    (path / "config.json").write_text(json.dumps(config, indent=2))


def mxfp4_model(path: Path) -> None:
    """gpt-oss with random blocks."""
    tensors = tiny("gpt_oss", path, **GPT_OSS)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[name + "_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[name + "_scales"] = torch.randint(110, 130, (experts, rows, columns // 32), dtype=torch.uint8)
    quantised(path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})


def fp8_model(path: Path) -> None:
    """DeepSeek-V3 with random FP8 in its projections and experts."""
    tensors = tiny("deepseek_v3", path, num_nextn_predict_layers=0)
    for name in [name for name in tensors if name.endswith("_proj.weight") or "_proj_with_mqa" in name]:
        rows, columns = tensors[name].shape
        codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
        tensors[name] = codes.view(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.rand(rows // 4, columns // 2) + 0.01
    quantised(path, tensors, FP8)


@pytest.mark.parametrize("make", [mxfp4_model, fp8_model])
def test_transformers_dequantises_to_the_same_bits(make: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make(tmp_path / "quantised")
    manifest = convert(tmp_path / "quantised", tmp_path / "m", "megatron")
    assert any(record.decoded for record in manifest.tensors.values())
    convert(tmp_path / "m", tmp_path / "back", "hf")
    assert verify(tmp_path / "quantised", tmp_path / "back").equal
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", dtype=torch.bfloat16).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    different = [n for n in ours if not torch.equal(ours[n].view(torch.int16), theirs[n].view(torch.int16))]
    assert different == []


@pytest.mark.parametrize("make", [mxfp4_model, fp8_model])
@pytest.mark.parametrize("tp", [1, 2])
def test_training_starts_from_the_quantised_files(make: Any, tp: int, tmp_path: Path) -> None:
    make(tmp_path / "quantised")
    convert(tmp_path / "quantised", tmp_path / "m", "megatron")
    direct, converted = WeightReader(tmp_path / "quantised"), WeightReader(tmp_path / "m")
    table = direct.table
    for key, tensor in table.megatron.items():
        item = 4 if direct.dtype_of(key) == "F32" else 2
        for expert in range(table.sizes["experts"]) if tensor.rule.experts else (None,):
            for region in table.shard(key, tp - 1, tp, 1 if tensor.stacked else None, expert):
                a, b = (np.zeros(region.num_elements * item, np.uint8) for _ in range(2))
                direct.read(key, region, memoryview(a))
                converted.read(key, region, memoryview(b))
                assert (a == b).all(), key


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    mxfp4_model(tmp_path / "quantised")
    tensors = load_file(tmp_path / "quantised" / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"][1, 2, 0] = 255
    save_file(tensors, tmp_path / "quantised" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="down_proj_scales: holds 255"):
        convert(tmp_path / "quantised", tmp_path / "m", "megatron")
