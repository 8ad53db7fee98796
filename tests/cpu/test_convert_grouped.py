"""GPTQ and AWQ: weights from packed codes, against the formats' definitions (`tests/support/quantised.py`)."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mswift.cli.main import main
from mswift.converters import group_decoders
from mswift.converters.decode import DecodedBytes, Decoding
from mswift.converters.dequantise import dequantised
from mswift.converters.engine import convert, plan
from mswift.converters.manifest import read_manifest
from mswift.converters.quantization import quantization_of
from mswift.converters.reader import WeightReader
from mswift.converters.verify import verify
from mswift.errors import CheckpointError
from tests.support.checkpoints import random_model, read_model, tiny_config
from tests.support.quantised import AWQ, GPTQ, Array, Grouped, quantise_grouped, random_grouped, write_typed

DECODED = "model.layers.1.mlp.down_proj.weight"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 103, "torch_dtype": "float16"}
KINDS: dict[str, dict[str, Any]] = {
    "gptq": GPTQ, "gptq_v2": GPTQ | {"checkpoint_format": "gptq_v2"}, "act": GPTQ | {"desc_act": True, "sym": False},
    "whole": GPTQ | {"group_size": -1}, "int8": GPTQ | {"bits": 8, "group_size": 16}, "awq": AWQ,
}  # fmt: skip


class Fake:
    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape


def decoding_of(weight: Grouped, how: dict[str, Any], dtype: str = "F32") -> tuple[Decoding, list[bytes]]:
    """The decoding of one weight "x", and the bytes of its inputs."""
    parts = weight.awq() if how["quant_method"] == "awq" else weight.gptq(0 if "checkpoint_format" in how else 1)
    quantization = quantization_of({"quantization_config": how})
    assert quantization is not None
    found = dequantised({f"x.{name}": Fake(d, a.shape) for name, (d, a) in parts.items()}, quantization, dtype)
    (decoding,) = found.values()
    return decoding, [parts[name.removeprefix("x.")][1].tobytes() for name in decoding.inputs]


def made(decoding: Decoding, inputs: list[bytes], cuts: list[int]) -> bytes:
    """The decoded bytes, read in pieces."""
    views = [memoryview(data) for data in inputs]
    stream = DecodedBytes(decoding, lambda number, low, high: views[number][low:high])
    block = memoryview(bytearray(decoding.nbytes))
    edges = [0, *sorted(cuts), decoding.nbytes]
    return b"".join(bytes(stream.read(a, b, block)) for a, b in pairwise(edges))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_format_in_any_cut(data: st.DataObject) -> None:
    how = KINDS[data.draw(st.sampled_from(list(KINDS)))]
    outputs = 8 * data.draw(st.integers(1, 4))
    group = data.draw(st.sampled_from([8, 16, -1])) if how["quant_method"] == "awq" else data.draw(st.integers(3, 20))
    inputs = 16 * data.draw(st.integers(1, 3))
    act_order = how.get("desc_act", False)
    weight = random_grouped(
        outputs, inputs, group, data.draw(st.integers(0, 99)), bits=how["bits"], act_order=act_order
    )
    decoding, parts = decoding_of(weight, how | {"group_size": group})
    assert decoding.shape == (outputs, inputs)
    cuts = [4 * c for c in data.draw(st.lists(st.integers(0, outputs * inputs), max_size=5))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_decoders, "SLAB_BYTES", data.draw(st.sampled_from([1, 100, 1 << 20])))
        assert made(decoding, parts, cuts) == weight.values.tobytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_with_every_zero(bits: int) -> None:
    top = (1 << bits) - 1
    codes = np.tile(np.arange(top + 1, dtype=np.uint32), (top, 1))
    zeros = np.arange(1, top + 1, dtype=np.uint32)[None]
    pad = -len(codes) % 8
    codes, zeros = np.pad(codes, ((0, pad), (0, 0))), np.pad(zeros, ((0, 0), (0, pad)), constant_values=1)
    weight = Grouped(codes, zeros, np.full(zeros.shape, 0.37, np.float16), np.zeros(top + 1, np.int64), bits)
    how = GPTQ | {"bits": bits, "group_size": -1}
    for each in (how, how | {"checkpoint_format": "gptq_v2"}, *([AWQ | {"group_size": -1}] if bits == 4 else [])):
        assert made(*decoding_of(weight, each), []) == weight.values.tobytes()


def test_rounded_once() -> None:
    weight = random_grouped(8, 32, 8)
    ours = made(*decoding_of(weight, GPTQ, "F16"), [])
    assert ours == weight.values.astype(np.float16).tobytes()


def borrowed(zeros: Array) -> Array:
    """[g, o / 8] words of zeros less one each, as GPTQModel subtracts: from the whole word, modulo 2**32."""
    words = np.zeros((zeros.shape[0], zeros.shape[1] // 8), np.uint32)
    for row, column in np.ndindex(words.shape):
        word = sum(int(zeros[row, 8 * column + k]) << (4 * k) for k in range(8))
        words[row, column] = (word - 0x11111111) % (1 << 32)
    return words.view(np.int32)


def test_a_zero_of_nothing_is_read_as_its_writer_wrote_it() -> None:
    """Less one it is 15 and borrows from its neighbour; who wrote it decides, and unknown writers are refused."""
    weight = random_grouped(16, 16, 8)
    how = GPTQ | {"sym": False}
    decoding, parts = decoding_of(weight, how)
    weight.zeros[:, ::3] = 0
    parts[1] = borrowed(weight.zeros).tobytes()
    by_gptqmodel = decoding_of(random_grouped(16, 16, 8), how | {"meta": {"quantizer": ["gptqmodel:7.7.0"]}})[0]
    assert made(by_gptqmodel, parts, []) == weight.values.tobytes()
    with pytest.raises(CheckpointError, match=r"x.qzeros: holds 15, a zero of 0 less one.*gptq_v2"):
        made(decoding, parts, [])


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("scales", np.float16(np.inf), "x.scales: holds a scale that is not finite"),
        ("g_idx", np.int32(2), "x.g_idx: holds a group that is not one of the 2"),
        ("g_idx", np.int32(-1), "x.g_idx: holds a group"),
    ],
)
def test_values_that_mean_nothing_are_refused(part: str, value: Any, message: str) -> None:
    decoding, parts = decoding_of(random_grouped(8, 16, 8), GPTQ)
    number = decoding.inputs.index(f"x.{part}")
    array = np.frombuffer(parts[number], value.dtype).copy()
    array[3] = value
    parts[number] = array.tobytes()
    with pytest.raises(CheckpointError, match=message):
        made(decoding, parts, [])


@pytest.mark.parametrize(
    ("how", "changes", "message"),
    [
        (GPTQ, {"qzeros": None}, r"x.qzeros: is absent; I32 \[2, 1\] is needed"),
        (GPTQ, {"scales": Fake("F16", (3, 8))}, r"x.scales: is F16 \[3, 8\]; F32 or BF16 or F16 \[2, 8\] is needed"),
        (GPTQ, {"scales": Fake("I32", (2, 8))}, r"x.scales: is I32"),
        (GPTQ, {"g_idx": Fake("I64", (16,))}, r"x.g_idx: is I64 \[16\]; I32 \[16\] is needed"),
        (GPTQ, {"qweight": Fake("F16", (2, 8))}, r"x.qweight: is F16 \[2, 8\]; I32"),
        (GPTQ, {"qweight": Fake("I32", (2, 9))}, r"x.qweight: \[2, 9\] of 4 bits means 16 inputs and 9 outputs"),
        (GPTQ | {"desc_act": True}, {"g_idx": None}, "desc_act is true, but x.g_idx"),
        (AWQ | {"group_size": 5}, {"qweight": Fake("I32", (16, 1))}, "groups of 5 inputs are whole"),
    ],
)
def test_parts_that_do_not_fit_are_refused(how: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    stored = {name: Fake(d, a.shape) for name, (d, a) in random_grouped(8, 16, 8).gptq().items()} | changes
    quantization = quantization_of({"quantization_config": how})
    assert quantization is not None
    with pytest.raises(CheckpointError, match=message):
        dequantised({f"x.{name}": tensor for name, tensor in stored.items() if tensor}, quantization, "F16")


def grouped_model(
    path: Path, how: dict[str, Any], model_type: str = "llama", **extra: tuple[str, Array]
) -> dict[str, Array]:
    """A quantised model in a directory; its tensors as bits of F16."""
    tensors = random_model(path, model_type, "F16", **SIZES)
    stored, values = quantise_grouped(tensors, how)
    write_typed(path / "model.safetensors", stored | extra)
    config = tiny_config(model_type, **SIZES) | {"quantization_config": how}
    (path / "config.json").write_text(json.dumps(config))
    return tensors | {name: array.astype(np.float16).view(np.uint16) for name, array in values.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_both_ways_round(kind: str, tmp_path: Path) -> None:
    tensors = grouped_model(tmp_path / "quantised", KINDS[kind], "qwen2" if kind == "gptq" else "llama")
    manifest = convert(tmp_path / "quantised", tmp_path / "megatron", "megatron")
    assert "quantization_config left out" in str(manifest)
    recorded = read_manifest(tmp_path / "megatron")
    assert recorded is not None
    assert recorded.tensors[DECODED].decoded.startswith("AWQ (4 bits less" if kind == "awq" else "GPTQ (")
    assert recorded.tensors["model.norm.weight"].decoded == ""
    convert(tmp_path / "megatron", tmp_path / "hf", "hf")
    back = read_model(tmp_path / "hf")
    assert back.keys() == tensors.keys()
    assert [name for name in tensors if (back[name] != tensors[name]).any()] == []
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    assert verify(tmp_path / "quantised", tmp_path / "hf").equal


@pytest.mark.parametrize("kind", ["act", "awq"])
def test_training_reads_what_is_converted(kind: str, tmp_path: Path) -> None:
    grouped_model(tmp_path / "quantised", KINDS[kind])
    convert(tmp_path / "quantised", tmp_path / "m", "megatron")
    ours, plain = WeightReader(tmp_path / "quantised"), WeightReader(tmp_path / "m")
    assert ours.dtype == "F16"
    for key, tensor in ours.table.megatron.items():
        for rank in range(2):
            for region in ours.table.shard(key, rank, 2, 1 if tensor.stacked else None):
                a, b = (bytearray(region.num_elements * 2) for _ in range(2))
                ours.read(key, region, memoryview(a))
                plain.read(key, region, memoryview(b))
                assert a == b, key
    assert "quantization_config" not in json.loads(ours.side_files()["config.json"])


def test_the_dtype_is_that_of_the_weights_around(tmp_path: Path) -> None:
    """GPTQModel writes F16 scales, and F16 biases of quantised linears, beside BF16 weights."""
    tensors = random_model(tmp_path / "q", "qwen2", "BF16", **SIZES | {"torch_dtype": "bfloat16"})
    stored, values = quantise_grouped(tensors, GPTQ)
    stored = {name: ("BF16" if name in tensors else kind, array) for name, (kind, array) in stored.items()}
    bias, numbers = "model.layers.1.self_attn.q_proj.bias", np.linspace(-3, 3, 32)
    stored[bias] = ("F16", numbers.astype(np.float16))
    write_typed(tmp_path / "q" / "model.safetensors", stored)
    config = tiny_config("qwen2", **SIZES) | {"torch_dtype": "bfloat16", "quantization_config": GPTQ}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "q", tmp_path / "hf", "hf")
    import torch

    back = read_model(tmp_path / "hf")
    for name, wanted in ((DECODED, values[DECODED]), (bias, numbers.astype(np.float16))):
        assert (back[name] == torch.from_numpy(wanted).bfloat16().view(torch.int16).numpy().view(np.uint16)).all()
    recorded = read_manifest(tmp_path / "hf")
    assert recorded is not None
    assert recorded.tensors[bias].decoded == "F16 cast to BF16"


def test_biases_of_zeros_are_left_behind_and_others_refused(tmp_path: Path) -> None:
    """AutoGPTQ gives every linear a bias."""
    name = "model.layers.1.mlp.down_proj.bias"
    grouped_model(tmp_path / "zeros", GPTQ, **{name: ("F16", np.zeros(32, np.float16))})
    assert plan(tmp_path / "zeros", "megatron").dropped[name].reason.startswith("zeros: the bias")
    convert(tmp_path / "zeros", tmp_path / "hf", "hf")
    assert name not in read_model(tmp_path / "hf")
    grouped_model(tmp_path / "ones", GPTQ, **{name: ("F16", np.ones(32, np.float16))})
    with pytest.raises(CheckpointError, match=f"{name} is not zero, and the model's .*down_proj has no bias"):
        plan(tmp_path / "ones", "megatron")


def test_the_dry_run_names_the_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grouped_model(tmp_path / "q", AWQ)
    argv = ["convert", "--model", str(tmp_path / "q"), "--to", "megatron", "--output_dir", str(tmp_path / "m")]
    assert main([*argv, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "AWQ (4 bits less the zero, times the F16 scale, of each 8 inputs), transposed, rounded to F16" in printed
    assert "config.json: quantization_config is left out" in printed
