"""Quantised and foreign checkpoints for tests, written by numpy or torch and not by the converter."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

Array = npt.NDArray[Any]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


def write_typed(path: Path, tensors: Mapping[str, tuple[str, Array]]) -> None:
    """A safetensors file of tensors that are given with their dtype's name and as bits."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(a).tobytes() for _, a in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def quantise_fp8(tensors: Mapping[str, Array], block: tuple[int, int], seed: int = 0) -> dict[str, tuple[str, Array]]:
    """Random FP8 in place of every projection of a BF16 model, with random scales; other tensors stay."""
    generator = np.random.default_rng(seed)
    result: dict[str, tuple[str, Array]] = {}
    for name, array in tensors.items():
        if "_proj.weight" not in name:
            result[name] = ("BF16", array)
            continue
        rows, columns = array.shape
        scales = generator.standard_normal((-(-rows // block[0]), -(-columns // block[1]))).astype(np.float32)
        result[name] = ("F8_E4M3", generator.integers(0, 256, array.shape, np.uint8))
        result[name + "_scale_inv"] = ("F32", scales)
    return result


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}


def packed_words(codes: Array, bits: int, order: Sequence[int]) -> Array:
    """[r, c] codes -> [r, c * bits / 32] words: code `order[k]` of each word's begins at its bit k * bits."""
    count = 32 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // count), np.uint32)
    for row in range(words.shape[0]):
        for column in range(words.shape[1]):
            word = 0
            for place, number in enumerate(order):
                word |= int(codes[row, column * count + number]) << (place * bits)
            words[row, column] = word
    return words.view(np.int32)


@dataclass(frozen=True)
class Grouped:
    """A weight of codes: [o, i] of `bits`, zeros and scales [g, o], the group of each input [i]."""

    codes: Array
    zeros: Array
    scales: Array
    group_of: Array
    bits: int = 4

    @property
    def values(self) -> Array:
        """[o, i] in float32."""
        zeros, scales = (part.astype(np.float32)[self.group_of].T for part in (self.zeros, self.scales))
        return scales * (self.codes.astype(np.float32) - zeros)

    def gptq(self, zero_less: int = 1) -> dict[str, tuple[str, Array]]:
        """AutoGPTQ's tensors; zero_less: 1 in its first format, 0 in gptq_v2."""
        order = range(32 // self.bits)
        return {
            "qweight": ("I32", np.ascontiguousarray(packed_words(self.codes, self.bits, order).T)),
            "qzeros": ("I32", packed_words(self.zeros - zero_less, self.bits, order)),
            "scales": ("F16", self.scales),
            "g_idx": ("I32", self.group_of.astype(np.int32)),
        }

    def awq(self) -> dict[str, tuple[str, Array]]:
        """AutoAWQ's tensors of version gemm."""
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {
            "qweight": ("I32", packed_words(np.ascontiguousarray(self.codes.T), 4, order)),
            "qzeros": ("I32", packed_words(self.zeros, 4, order)),
            "scales": ("F16", self.scales),
        }


def random_grouped(
    outputs: int, inputs: int, group: int, seed: int = 0, *, bits: int = 4, act_order: bool = False
) -> Grouped:
    """Random codes; zeros are 1 or more, as GPTQ's first format needs."""
    generator = np.random.default_rng(seed)
    size = inputs if group == -1 else group
    groups, top = -(-inputs // size), (1 << bits) - 1
    group_of = np.arange(inputs) // size
    return Grouped(
        generator.integers(0, top, (outputs, inputs), np.uint32, endpoint=True),
        generator.integers(1, top, (groups, outputs), np.uint32, endpoint=True),
        generator.uniform(0.001, 0.02, (groups, outputs)).astype(np.float16),
        generator.permutation(group_of) if act_order else group_of,
        bits,
    )


def quantise_grouped(
    tensors: Mapping[str, Array], how: Mapping[str, Any], seed: int = 0, plain: str = ""
) -> tuple[dict[str, tuple[str, Array]], dict[str, Array]]:
    """Random codes in place of every projection of an F16 model but `plain`; the tensors of the file, and the float32
    values."""
    stored: dict[str, tuple[str, Array]] = {}
    values = {}
    for number, (name, array) in enumerate(tensors.items()):
        if "_proj.weight" not in name or name == plain:
            stored[name] = ("F16", array)
            continue
        act_order = how.get("desc_act", False)
        weight = random_grouped(*array.shape, how["group_size"], seed + number, bits=how["bits"], act_order=act_order)
        plus = 0 if how.get("checkpoint_format") == "gptq_v2" else 1
        parts = weight.awq() if how["quant_method"] == "awq" else weight.gptq(plus)
        stored |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
        values[name] = weight.values
    return stored, values


def quantise_directory(path: Path, how: Mapping[str, Any], into: Path, plain: str = "") -> None:
    """A copy in F16 of a model's directory, with random codes in place of every projection but `plain`.

    And `<into>-plain`: of those weights.
    """
    whole = into.with_name(into.name + "-plain")
    config = json.loads((path / "config.json").read_text()) | {"dtype": "float16"}
    tensors = {name: array.astype(np.float16) for name, array in load_file(path / "model.safetensors").items()}
    stored, values = quantise_grouped(tensors, how, plain=plain)
    tensors |= {name: array.astype(np.float16) for name, array in values.items()}
    for home, extra in ((into, {"quantization_config": how}), (whole, {})):
        shutil.copytree(path, home)
        (home / "config.json").write_text(json.dumps(config | extra))
    write_typed(into / "model.safetensors", stored)
    write_typed(whole / "model.safetensors", {name: ("F16", array) for name, array in tensors.items()})
