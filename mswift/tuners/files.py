"""Writing a safetensors file tensor by tensor, in blocks of bounded size."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

from mswift.converters.io.safetensors import encode_header
from mswift.converters.layout import Region
from mswift.converters.plan import DTYPE_BYTES

BLOCK_BYTES = 32 << 20
"""Largest piece of a tensor in memory at once, unless a single row is larger."""


def row_blocks(shape: tuple[int, ...], item_bytes: int) -> Iterator[Region]:
    """The tensor as consecutive boxes of whole rows, each of about BLOCK_BYTES."""
    rows = max(1, BLOCK_BYTES // max(1, prod(shape[1:]) * item_bytes))
    for first in range(0, shape[0], rows):
        yield Region((first, *(0 for _ in shape[1:])), (min(rows, shape[0] - first), *shape[1:]))


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    blocks: Callable[[str], Iterable[memoryview | bytearray]],
) -> None:
    """A new file holding `tensors` (name -> dtype, shape) in this order; `blocks` yields a tensor's bytes in C order.

    Fsynced when this returns.
    """
    header, _ = encode_header(tensors)
    with open(path, "xb") as file:
        file.write(header)
        for name, (dtype, shape) in tensors.items():
            start = file.tell()
            for block in blocks(name):
                file.write(block)
            written, expected = file.tell() - start, prod(shape) * DTYPE_BYTES[dtype]
            if written != expected:
                raise ValueError(f"{path}: {name} got {written} bytes, its shape {list(shape)} needs {expected}")
        file.flush()
        os.fsync(file.fileno())
