"""MXFP4 experts as gpt-oss stores them, through a family that keeps them stacked, transposed and interleaved."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mswift.converters import catalog
from mswift.converters.dense import DECODER, H, M, dense_spec
from mswift.converters.engine import convert, describe, plan
from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.manifest import read_manifest
from mswift.converters.reader import WeightReader
from mswift.converters.rules import columns, experts, interleaved_gate_up, same
from mswift.converters.sources import open_source
from mswift.converters.spec import LayerSpec, ModelSpec, MoeSpec
from mswift.converters.verify import verify
from mswift.errors import CheckpointError
from tests.support.checkpoints import random_model, tiny_config
from tests.support.quantised import Array, write_typed

EXPERTS, HIDDEN, FFN = 4, 64, 32
LUT = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
MLP = M + "mlp.experts.experts.linear_fc"


def _spec(config: Fields) -> ModelSpec:
    layers = (LayerSpec(mlp="moe"),) * config.integer("num_hidden_layers")
    return dense_spec(config, max_positions=64, moe=MoeSpec(EXPERTS, 2, FFN), layers=layers)


RULES = (
    *(rule for rule in DECODER if "mlp." not in getattr(rule, "megatron", "") or "layer_norm" in rule.megatron),
    experts(
        interleaved_gate_up(MLP + "1.weight", H + "mlp.experts.gate_up_proj", width=("hidden",), ffn="moe_ffn"),
        "stacked",
        transposed=True,
    ),
    experts(
        same(MLP + "2.weight", H + "mlp.experts.down_proj", ("hidden", "moe_ffn"), cut=columns("moe_ffn")),
        "stacked",
        transposed=True,
    ),
)
FAMILY = Family("llama", "LlamaForCausalLM", RULES, _spec)


def dequantised(blocks: Array, scales: Array) -> Array:
    """[experts, columns, rows] as float32, element by element."""
    pairs = np.stack([LUT[blocks & 15], LUT[blocks >> 4]], -1).reshape(*blocks.shape[:3], 32)
    values = pairs * (2.0 ** (scales.astype(np.float64) - 127))[..., None]
    return values.reshape(*blocks.shape[:2], -1).transpose(0, 2, 1).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Array]]:
    """A quantised model and the values of its experts."""
    monkeypatch.setattr(catalog, "family_for", lambda config: FAMILY)
    monkeypatch.setattr("mswift.converters.plan.family_for", lambda config: FAMILY)
    changes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 2, "head_dim": 16}
    tensors = random_model(tmp_path / "hf", **changes)
    stored: dict[str, tuple[str, Array]] = {n: ("BF16", a) for n, a in tensors.items() if ".mlp." not in n}
    generator, expected = np.random.default_rng(0), {}
    for layer in range(2):
        for name, rows, columns_ in (("gate_up_proj", 2 * FFN, HIDDEN), ("down_proj", HIDDEN, FFN)):
            full = f"model.layers.{layer}.mlp.experts.{name}"
            blocks = generator.integers(0, 256, (EXPERTS, rows, columns_ // 32, 16), np.uint8)
            scales = generator.integers(100, 140, blocks.shape[:3], np.uint8)
            stored |= {full + "_blocks": ("U8", blocks), full + "_scales": ("U8", scales)}
            expected[full] = dequantised(blocks, scales)
    write_typed(tmp_path / "hf" / "model.safetensors", stored)
    config = tiny_config(**changes) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    return tmp_path / "hf", expected


def floats(source: Any, name: str) -> Array:
    """One HF tensor, exactly as bfloat16 has it."""
    block = memoryview(bytearray(source.num_bytes(name)))
    source.stream(name, memoryview(bytearray(1 << 20)))(0, len(block), block)
    return (np.frombuffer(block, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(source.table.hf[name])


def test_mxfp4_becomes_bf16_and_goes_both_ways(model: tuple[Path, dict[str, Array]], tmp_path: Path) -> None:
    path, expected = model
    assert "MXFP4 (e2m1 times the e8m0 scale of each 32), transposed" in describe(plan(path, "megatron"), 1 << 30)
    convert(path, tmp_path / "m", "megatron")
    convert(tmp_path / "m", tmp_path / "back", "hf")
    source = open_source(tmp_path / "back")
    for name, values in expected.items():
        assert (floats(source, name) == values).all()
    assert verify(path, tmp_path / "back").equal
    recorded = read_manifest(tmp_path / "m")
    assert recorded is not None
    assert sum(bool(t.decoded) for t in recorded.tensors.values()) == 4
    assert recorded.config_edits == {"quantization_config": None}


@pytest.mark.parametrize("tp", [1, 2])
def test_training_reads_mxfp4_as_it_is_converted(tp: int, model: tuple[Path, dict[str, Array]], tmp_path: Path) -> None:
    convert(model[0], tmp_path / "m", "megatron")
    ours, plain = WeightReader(model[0]), WeightReader(tmp_path / "m")
    for key, tensor in ours.table.megatron.items():
        for expert in range(EXPERTS) if tensor.rule.experts else (None,):
            for region in ours.table.shard(key, tp - 1, tp, 1 if tensor.stacked else None, expert):
                a, b = (bytearray(region.num_elements * 2) for _ in range(2))
                ours.read(key, region, memoryview(a))
                plain.read(key, region, memoryview(b))
                assert a == b, key


def test_a_scale_that_is_no_number_is_refused(model: tuple[Path, dict[str, Array]], tmp_path: Path) -> None:
    raw = bytearray((model[0] / "model.safetensors").read_bytes())
    raw[-1] = 255  # the last scale
    (model[0] / "model.safetensors").write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match="down_proj_scales: holds 255"):
        convert(model[0], tmp_path / "m", "megatron")
