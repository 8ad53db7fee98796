"""Quantised and foreign checkpoints for tests, written by numpy or torch and not by the converter."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
