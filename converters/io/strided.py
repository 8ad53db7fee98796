"""Flat byte maps (`layout.flatten`) executed between memory (side 0) and a file (side 1), in bounded memory.

What is contiguous in the file moves by one system call: directly if it is contiguous in memory too, as a list of runs
(preadv, pwritev) if the runs are long, through a tile and numpy if they are short.
"""

import os
from collections.abc import Callable, Iterator
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from mswift.converters.io.files import read_exactly, write_exactly
from mswift.converters.layout import Dim, Piece, Region, restrict

LIST_RUN_BYTES = 512
"""Runs of at least so many bytes go into one call as a list; a list entry costs about as much as copying them."""

_LONGEST_LIST = 1024  # IOV_MAX of Linux


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
        elif not _listed(os.preadv, fd, memory, start - base, dims, offset):
            read_exactly(fd, tile[:size], offset, path)
            _copy(memory, start - base, 0, tile, 0, 1, dims)
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
                _copy(memory, target, 1, data, source - low, 0, dims)
    return count


def scatter(fd: int, copy: Piece, memory: memoryview, base: int, tile: memoryview) -> int:
    """Writes the map's bytes of memory, whose byte 0 is position `base` of side 0, to the file; returns bytes."""
    count = 0
    for part in _file_runs(copy, len(tile)):
        (start,), (offset,), dims = part.starts[0], part.starts[1], part.dims
        size = _span(dims, 1)
        if len(dims) <= 1:
            write_exactly(fd, memory[start - base : start - base + size], offset)
        elif not _listed(os.pwritev, fd, memory, start - base, dims, offset):
            _copy(tile, 0, 1, memory, start - base, 0, dims)
            write_exactly(fd, tile[:size], offset)
        count += size
    return count


def run_bytes(copy: Piece) -> int:
    """Length of the runs of a map that are contiguous on both sides."""
    if not copy.dims:
        return 1
    last = copy.dims[-1]
    return last.size if last.step == (1, 1) else 1


def runs(copy: Piece) -> Iterator[tuple[int, int, int]]:
    """(position on side 0, position on side 1, length) of every run that is contiguous on both sides."""
    length = run_bytes(copy)
    outer = copy.dims[:-1] if length > 1 else copy.dims
    for index in product(*(range(d.size) for d in outer)):
        a, b = (
            start[0] + sum(i * d.step[side] for i, d in zip(index, outer, strict=True))
            for side, start in enumerate(copy.starts)
        )
        yield a, b, length


def _listed(call: Any, fd: int, memory: memoryview, start: int, dims: tuple[Dim, ...], offset: int) -> bool:
    """Tries to move runs of memory that are one run of the file by preadv or pwritev; False if it must be otherwise."""
    last = dims[-1]
    if last.step != (1, 1) or last.size < LIST_RUN_BYTES:
        return False
    outer = sorted(dims[:-1], key=lambda d: -d.step[1])
    starts = [start]
    for dim in outer:
        starts = [s + i * dim.step[0] for s in starts for i in range(dim.size)]
    views = [memory[s : s + last.size] for s in starts]
    for first in range(0, len(views), _LONGEST_LIST):
        some = views[first : first + _LONGEST_LIST]
        try:
            if call(fd, some, offset + first * last.size) != len(some) * last.size:
                return False
        except OSError:  # the other way meets it again, and words it
            return False
    return True


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


def _copy(
    to: memoryview, to_start: int, to_side: int, source: memoryview, start: int, side: int, dims: tuple[Dim, ...]
) -> None:
    """Moves the bytes that dims walk from `source` (their side `side`) to `to` (their side `to_side`)."""
    import numpy as np  # only here: its import takes as long as copying 100 MB

    last = dims[-1]
    item = next((n for n in (8, 4, 2) if last.step == (1, 1) and last.size % n == 0), 1)  # numpy is slow byte by byte
    if item > 1:
        rest = (Dim(last.size // item, last.axis, (item, item)),) if last.size > item else ()
        dims = (*dims[:-1], *rest)

    shape = [d.size for d in dims]
    target, values = (
        np.ndarray(shape, f"<u{item}", memory, first, [d.step[on] for d in dims])
        for memory, first, on in ((to, to_start, to_side), (source, start, side))
    )
    np.copyto(target, values)
