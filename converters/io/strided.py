"""Flat byte maps (`layout.flatten`) executed between memory (side 0) and a file (side 1), through a bounded tile."""

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mswift.converters.io.files import read_exactly, write_exactly
from mswift.converters.layout import Dim, Piece, Region, restrict


def cut(copy: Piece, low: int, high: int) -> list[Piece]:
    """The parts of a byte map whose side 0 lies in bytes [low, high)."""
    start = copy.starts[0][0]
    end = start + _span(copy.dims, 0)
    if low <= start and end <= high:
        return [copy]
    if end <= low or high <= start:
        return []
    return restrict(copy, Region((low,), (high - low,)), 0)


def gather(fd: int, path: Path, copy: Piece, memory: memoryview, base: int, tile: memoryview) -> int:
    """Reads the map's bytes of the file, and no others, into memory whose byte 0 is position `base` of side 0.

    Returns bytes read; `path` is for the error message.
    """
    count = 0
    for part in _file_runs(copy, len(tile)):
        (start,), (offset,), dims = part.starts[0], part.starts[1], part.dims
        size = _span(dims, 1)
        if len(dims) <= 1:
            read_exactly(fd, memory[start - base : start - base + size], offset, path)
        else:
            read_exactly(fd, tile[:size], offset, path)
            np.copyto(_view(memory, start - base, dims, 0), _view(tile, 0, dims, 1))
        count += size
    return count


_SHORT_RUN_BYTES = 1 << 10

Read = Callable[[int, int, memoryview], memoryview]
"""(low, high, block) -> bytes [low, high) of a stream, in block."""


def gather_from(read: Read, copy: Piece, memory: memoryview, block: memoryview) -> int:
    """Like `gather` (base 0), with the bytes of side 1 out of a stream, in its order; returns bytes read.

    Long runs are read alone; where runs are short, what lies between them is read too.
    """
    back = copy.inverse()
    runs = _file_runs(copy, len(block)) if copy.dims[-1].size >= _SHORT_RUN_BYTES else (copy,)
    count = 0
    for part in runs:
        first, end = part.starts[1][0], part.starts[1][0] + _span(part.dims, 1)
        for low in range(first, end, len(block)):
            data = read(low, min(end, low + len(block)), block)
            count += len(data)
            for piece in cut(back if part is copy else part.inverse(), low, low + len(data)):
                (source,), (target,), dims = piece.starts[0], piece.starts[1], piece.dims
                np.copyto(_view(memory, target, dims, 1), _view(data, source - low, dims, 0))
    return count


def scatter(fd: int, copy: Piece, memory: memoryview, base: int, tile: memoryview) -> int:
    """Writes the map's bytes of memory, whose byte 0 is position `base` of side 0, to the file; returns bytes."""
    count = 0
    for part in _file_runs(copy, len(tile)):
        (start,), (offset,), dims = part.starts[0], part.starts[1], part.dims
        size = _span(dims, 1)
        if len(dims) <= 1:
            write_exactly(fd, memory[start - base : start - base + size], offset)
        else:
            np.copyto(_view(tile, 0, dims, 1), _view(memory, start - base, dims, 0))
            write_exactly(fd, tile[:size], offset)
        count += size
    return count


def _file_runs(copy: Piece, limit: int) -> Iterator[Piece]:
    """Parts that are contiguous in the file: single runs of any length, strided ones of at most `limit` bytes."""
    dims = copy.dims
    size = _span(dims, 1)
    contiguous = size == prod(d.size for d in dims)
    if len(dims) <= 1 or (contiguous and size <= limit):
        yield copy
        return
    widest = max(range(len(dims)), key=lambda i: dims[i].step[1])
    outer, inner = dims[widest], dims[:widest] + dims[widest + 1 :]
    batch = max(1, limit // outer.step[1]) if contiguous else 1
    for first in range(0, outer.size, batch):
        count = min(batch, outer.size - first)
        part = inner if count == 1 else (*dims[:widest], Dim(count, outer.axis, outer.step), *dims[widest + 1 :])
        start, offset = (s[0] + first * step for s, step in zip(copy.starts, outer.step, strict=True))
        yield from _file_runs(Piece(copy.names, ((start,), (offset,)), part), limit)


def _span(dims: tuple[Dim, ...], side: int) -> int:
    """Bytes from the first to past the last byte that the dims touch on one side."""
    return 1 + sum((d.size - 1) * d.step[side] for d in dims)


def _view(memory: memoryview, start: int, dims: tuple[Dim, ...], side: int) -> npt.NDArray[Any]:
    part = np.frombuffer(memory[start : start + _span(dims, side)], np.uint8)
    return np.lib.stride_tricks.as_strided(part, [d.size for d in dims], [d.step[side] for d in dims])
