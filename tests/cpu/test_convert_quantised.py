"""Dequantisation and casts, bit for bit those of torch and transformers."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mswift.converters.decode import DTYPE_NAMES, DecodedBytes, Decoding
from mswift.converters.decoders import E4M3, narrow, widen
from mswift.converters.dequantise import dequantised
from mswift.converters.describe import describe
from mswift.converters.engine import convert, plan
from mswift.converters.manifest import read_manifest
from mswift.converters.quantization import Quantization
from mswift.converters.reader import WeightReader
from mswift.converters.source import SourceOptions
from mswift.converters.sources import open_source
from mswift.converters.verify import verify
from mswift.errors import CheckpointError
from tests.support.checkpoints import random_model, read_model, tiny_config
from tests.support.quantised import FP8, quantise_fp8, write_typed

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def bits(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes."""
    return tensor.clone().reshape(-1).view(torch.uint8).numpy()


def test_every_fp8_value() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert (np.isnan(theirs) == np.isnan(E4M3)).all()
    finite = ~np.isnan(theirs)
    assert (theirs[finite].view(np.uint32) == E4M3[finite].view(np.uint32)).all()


@pytest.mark.parametrize("dtype", TORCH)
def test_narrowing_is_torchs(dtype: str) -> None:
    """All 2^32 floats are too many: every exponent and sign, with mantissas around every tie."""
    generator = np.random.default_rng(0)
    tails = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x17FF, 0x1800], np.uint32)
    tops = np.arange(1 << 16, dtype=np.uint32) << 16
    values = np.concatenate(
        [(tops[:, None] | tails[None]).reshape(-1), generator.integers(0, 1 << 32, 1 << 20, np.uint32)]
    )
    floats = values.view(np.float32)
    floats = floats[~np.isnan(floats)]
    theirs = torch.from_numpy(floats.copy()).to(TORCH[dtype])
    assert (narrow(floats, dtype).view(np.uint8) == bits(theirs)).all()
    back = widen(dtype, memoryview(bits(theirs)))
    assert (back.view(np.uint32) == theirs.float().numpy().view(np.uint32)).all()


@pytest.mark.parametrize("dtype", TORCH)
def test_a_nan_stays_one(dtype: str) -> None:
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0x7FC00000], np.uint32).view(np.float32)
    assert np.isnan(widen(dtype, memoryview(narrow(nans, dtype).view(np.uint8)))).all()


def made(decoding: Decoding, inputs: list[bytes], cuts: list[int]) -> bytes:
    """The decoded bytes, read in pieces."""
    views = [memoryview(data) for data in inputs]
    stream = DecodedBytes(decoding, lambda number, low, high: views[number][low:high])
    block = memoryview(bytearray(decoding.nbytes))
    edges = [0, *sorted(cuts), decoding.nbytes]
    return b"".join(bytes(stream.read(a, b, block)) for a, b in pairwise(edges))


class Fake:
    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape


def fp8_by_torch(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """[rows, columns] of float8_e4m3fn times the scale of each block."""
    wide = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (weight.float() * wide[: weight.shape[0], : weight.shape[1]]).to(dtype)


@given(data=st.data())
def test_fp8_blocks_are_torchs_in_any_cut(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    block = (data.draw(st.integers(1, 16)), data.draw(st.integers(1, 16)))
    dtype, scale_dtype = data.draw(st.sampled_from(list(TORCH))), data.draw(st.sampled_from(["F32", "BF16"]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    codes = torch.randint(0, 254, (rows, columns), dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    weight = codes.view(torch.float8_e4m3fn)
    scale = torch.randn(-(-rows // block[0]), -(-columns // block[1])).to(TORCH[scale_dtype])
    stored = {"w": Fake("F8_E4M3", (rows, columns)), "w_scale_inv": Fake(scale_dtype, tuple(scale.shape))}
    decoding = dequantised(stored, Quantization("fp8", block), dtype)["w"]
    item = decoding.nbytes // (rows * columns)
    cuts = [c * item for c in data.draw(st.lists(st.integers(0, rows * columns), max_size=5))]
    expected = fp8_by_torch(weight, scale, block, TORCH[dtype])
    assert made(decoding, [bits(weight).tobytes(), bits(scale).tobytes()], cuts) == bits(expected).tobytes()


@given(data=st.data())
def test_mxfp4_is_transformers_in_any_cut(data: st.DataObject) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    experts, rows, groups = (data.draw(st.integers(1, n)) for n in (3, 7, 4))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8)
    scales = torch.randint(0, 252, (experts, rows, groups), dtype=torch.uint8)
    stored = {"x_blocks": Fake("U8", tuple(blocks.shape)), "x_scales": Fake("U8", tuple(scales.shape))}
    decoding = dequantised(stored, Quantization("mxfp4"), "BF16")["x"]
    expected = convert_moe_packed_tensors(blocks, scales)
    assert decoding.shape == tuple(expected.shape)
    cuts = [c * 2 for c in data.draw(st.lists(st.integers(0, decoding.nbytes // 2), max_size=5))]
    assert made(decoding, [bits(blocks).tobytes(), bits(scales).tobytes()], cuts) == bits(expected).tobytes()


def test_every_mxfp4_value_times_every_scale() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 252, 1, 1)
    scales = torch.arange(252, dtype=torch.uint8)[None, :, None].repeat(1, 1, 16)
    stored = {"x_blocks": Fake("U8", tuple(blocks.shape)), "x_scales": Fake("U8", tuple(scales.shape))}
    decoding = dequantised(stored, Quantization("mxfp4"), "BF16")["x"]
    ours = made(decoding, [bits(blocks).tobytes(), bits(scales).tobytes()], [])
    assert ours == bits(convert_moe_packed_tensors(blocks, scales)).tobytes()


def test_a_narrow_band_of_a_large_expert_is_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from mswift.converters import decoders

    generator = np.random.default_rng(0)
    blocks, scales = (
        generator.integers(0, 256, (2, 6, 5, 16), np.uint8),
        generator.integers(1, 250, (2, 6, 5), np.uint8),
    )
    stored = {"x_blocks": Fake("U8", blocks.shape), "x_scales": Fake("U8", scales.shape)}
    decoding = dequantised(stored, Quantization("mxfp4"), "F32")["x"]
    whole = made(decoding, [blocks.tobytes(), scales.tobytes()], [])
    monkeypatch.setattr(decoders, "_SLAB_BYTES", 2 * 16 * 6)
    assert made(decoding, [blocks.tobytes(), scales.tobytes()], [1000, 1004, 4000]) == whole


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"w": Fake("F8_E4M3", (4, 4))}, "w: is F8_E4M3 .* without a w_scale_inv"),
        ({"w": Fake("F8_E4M3", (4, 4)), "w_scale_inv": Fake("F32", (2, 2))}, r"needs F32 \[1, 1\]"),
        ({"w": Fake("F8_E4M3", (4, 4)), "w_scale_inv": Fake("F16", (1, 1))}, "w_scale_inv: is F16"),
    ],
)
def test_parts_that_do_not_fit_are_refused(stored: dict[str, Fake], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        dequantised(stored, Quantization("fp8", (128, 128)), "BF16")


def fp8_model(path: Path, **changes: Any) -> dict[str, np.ndarray]:
    """A quantised model in a directory; its tensors as torch dequantises them, as BF16 bits."""
    block = (16, 8)
    tensors = random_model(path, **changes)
    stored = quantise_fp8(tensors, block)
    for name, (dtype, array) in stored.items():
        if dtype == "F8_E4M3":
            array[(array & 0x7F) == 0x7F] = 0
            scale = torch.from_numpy(stored[name + "_scale_inv"][1])
            weight = torch.from_numpy(array).view(torch.float8_e4m3fn)
            tensors[name] = fp8_by_torch(weight, scale, block, torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    write_typed(path / "model.safetensors", stored)
    config = tiny_config(**changes) | {"quantization_config": FP8 | {"weight_block_size": list(block)}}
    (path / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_an_fp8_checkpoint_becomes_bf16(to: Any, tmp_path: Path) -> None:
    tensors = fp8_model(tmp_path / "fp8")
    planned = describe(plan(tmp_path / "fp8", to), 5_000_000_000)
    assert "F8_E4M3 times F32 scale of each 16x8 block, rounded to BF16" in planned
    assert "config.json: quantization_config is left out" in planned
    manifest = convert(tmp_path / "fp8", tmp_path / to, to)
    assert "quantization_config left out" in str(manifest)
    recorded = read_manifest(tmp_path / to)
    assert recorded is not None
    assert recorded.config_edits == {"quantization_config": None}
    name = "model.layers.1.mlp.down_proj.weight"
    assert recorded.tensors[name].decoded.startswith("F8_E4M3 times")
    assert recorded.tensors["model.norm.weight"].decoded == ""
    if to == "megatron":
        convert(tmp_path / "megatron", tmp_path / "hf", "hf")
    back = read_model(tmp_path / "hf")
    assert back.keys() == tensors.keys()
    assert all((back[name] == tensors[name]).all() for name in tensors)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == tiny_config()
    assert verify(tmp_path / "fp8", tmp_path / to).equal


def test_training_reads_fp8_as_it_is_converted(tmp_path: Path) -> None:
    fp8_model(tmp_path / "fp8")
    convert(tmp_path / "fp8", tmp_path / "m", "megatron")
    ours, plain = WeightReader(tmp_path / "fp8"), WeightReader(tmp_path / "m")
    assert ours.dtype == "BF16"
    for key in ours.table.megatron:
        for rank in range(2):
            for region in ours.table.shard(key, rank, 2, 1 if ours.table.megatron[key].stacked else None):
                a, b = (bytearray(region.num_elements * 2) for _ in range(2))
                ours.read(key, region, memoryview(a))
                plain.read(key, region, memoryview(b))
                assert a == b, key
    assert "quantization_config" not in json.loads(ours.side_files()["config.json"])


@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_a_cast_is_torchs_and_recorded(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dtype = DTYPE_NAMES[name]
    tensors = random_model(tmp_path / "hf", "llama", "F32", torch_dtype="float32")
    floats = {n: torch.randn(a.shape) for n, a in tensors.items()}
    write_typed(tmp_path / "hf" / "model.safetensors", {n: ("F32", t.numpy()) for n, t in floats.items()})
    options = SourceOptions(dtype=dtype)
    manifest = convert(tmp_path / "hf", tmp_path / "megatron", "megatron", source_options=options)
    assert {t.decoded for t in manifest.tensors.values()} == {"" if dtype == "F32" else f"F32 cast to {dtype}"}
    convert(tmp_path / "megatron", tmp_path / "back", "hf")
    source = open_source(tmp_path / "back")
    tile = memoryview(bytearray(1 << 20))
    for each, tensor in floats.items():
        block = memoryview(bytearray(source.num_bytes(each)))
        assert bytes(source.stream(each, tile)(0, len(block), block)) == bits(tensor.to(TORCH[dtype])).tobytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == name
    report = verify(tmp_path / "hf", tmp_path / "back")
    assert report.equal == (dtype == "F32")
    assert verify(tmp_path / "hf", tmp_path / "back", options=options).equal


def test_an_overflow_is_refused_with_its_place(tmp_path: Path) -> None:
    tensors = random_model(tmp_path / "hf", "llama", "F32", torch_dtype="float32")
    floats = {n: np.zeros(a.shape, np.float32) for n, a in tensors.items()}
    floats["model.layers.1.mlp.up_proj.weight"][3, 5] = -70000
    floats["model.layers.1.mlp.up_proj.weight"][3, 6] = np.inf
    write_typed(tmp_path / "hf" / "model.safetensors", {n: ("F32", a) for n, a in floats.items()})
    with pytest.raises(CheckpointError, match=r"up_proj.weight\[3, 5\] is -70000: F16 holds at most 65504 \(1 of"):
        convert(tmp_path / "hf", tmp_path / "out", "megatron", source_options=SourceOptions(dtype="F16"))
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "hf", tmp_path / "out", "megatron", source_options=SourceOptions(dtype="BF16"))
