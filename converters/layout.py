"""Invertible index maps between two tensors, in exact integer arithmetic (standard library only).

A `Piece` is an affine map between a box of tensor A (side 0, here: Hugging Face) and a box of tensor B
(side 1, here: Megatron). It is a start index on each side and a few `Dim`s: walking one step along a Dim walks
`step[0]` along axis `axis[0]` of A and `step[1]` along axis `axis[1]` of B. Concatenation, per-group
interleaving (qkv), stacking of layers and transposition are all of this form; the inverse swaps the sides.
Nothing here enumerates elements: costs grow with the number of pieces.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod


@dataclass(frozen=True)
class Region:
    """A box of a tensor: first index and size per axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def full(shape: Sequence[int]) -> "Region":
        """The whole tensor of that shape."""
        return Region((0,) * len(shape), tuple(shape))

    @property
    def num_elements(self) -> int:
        return prod(self.sizes)

    def intersect(self, other: "Region") -> "Region | None":
        """The common box, or None."""
        offsets, sizes = [], []
        for a, s, b, t in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            low, high = max(a, b), min(a + s, b + t)
            if high <= low:
                return None
            offsets.append(low)
            sizes.append(high - low)
        return Region(tuple(offsets), tuple(sizes))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{o + s}" for o, s in zip(self.offsets, self.sizes, strict=True)) + "]"


@dataclass(frozen=True)
class Dim:
    """`size` steps, each `step[side]` along axis `axis[side]`."""

    size: int
    axis: tuple[int, int]
    step: tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """An affine bijection between a box pattern of tensor `names[0]` and one of tensor `names[1]`."""

    names: tuple[str, str]
    starts: tuple[tuple[int, ...], tuple[int, ...]]
    dims: tuple[Dim, ...]

    @property
    def num_elements(self) -> int:
        return prod(d.size for d in self.dims)

    def inverse(self) -> "Piece":
        """The same map read from side 1 to side 0."""
        dims = tuple(Dim(d.size, (d.axis[1], d.axis[0]), (d.step[1], d.step[0])) for d in self.dims)
        return Piece((self.names[1], self.names[0]), (self.starts[1], self.starts[0]), dims)

    def hull(self, side: int) -> Region:
        """The smallest box that holds everything the piece covers on one side."""
        sizes = [1] * len(self.starts[side])
        for dim in self.dims:
            sizes[dim.axis[side]] += (dim.size - 1) * dim.step[side]
        return Region(self.starts[side], tuple(sizes))

    def moved(self, side: int, by: int) -> "Piece":
        """A flat map (one axis) whose positions on `side` are shifted."""
        starts = list(self.starts)
        starts[side] = (starts[side][0] + by,)
        return Piece(self.names, (starts[0], starts[1]), self.dims)

    def footprint(self, side: int) -> tuple[object, ...]:
        """What decides the boxes on one side: where it starts, and its dims there."""
        return self.starts[side], tuple((d.size, d.axis[side], d.step[side]) for d in self.dims)

    def boxes(self, side: int) -> list[Region]:
        """The boxes that this piece covers on one side."""
        per_axis = [
            _intervals([(d.size, d.step[side]) for d in self.dims if d.axis[side] == axis])
            for axis in range(len(self.starts[side]))
        ]
        start = self.starts[side]
        return [
            Region(tuple(s + lo for s, (lo, _) in zip(start, box, strict=True)), tuple(n for _, n in box))
            for box in product(*per_axis)
        ]


def restrict(piece: Piece, region: Region, side: int) -> list[Piece]:
    """The parts of a piece whose elements on `side` lie inside the region."""
    parts = [piece]
    for axis in range(len(region.offsets)):
        parts = [p for part in parts for p in _restrict_axis(part, region, side, axis)]
    return parts


def _restrict_axis(piece: Piece, region: Region, side: int, axis: int) -> Iterator[Piece]:
    chosen = [i for i, d in enumerate(piece.dims) if d.axis[side] == axis]
    low = region.offsets[axis] - piece.starts[side][axis]
    extent = 1
    for i in chosen:
        extent += (piece.dims[i].size - 1) * piece.dims[i].step[side]
    if low <= 0 and extent <= low + region.sizes[axis]:  # all of it: by far the most frequent case
        yield piece
        return
    chosen.sort(key=lambda i: -piece.dims[i].step[side])
    steps = [(piece.dims[i].size, piece.dims[i].step[side]) for i in chosen]
    for ranges in _index_ranges(steps, low, low + region.sizes[axis]):
        dims = list(piece.dims)
        starts = [list(piece.starts[0]), list(piece.starts[1])]
        for i, (first, count) in zip(chosen, ranges, strict=True):
            dim = dims[i]
            dims[i] = Dim(count, dim.axis, dim.step)
            for s in (0, 1):
                starts[s][dim.axis[s]] += first * dim.step[s]
        kept = tuple(d for d in dims if d.size != 1)
        yield Piece(piece.names, (tuple(starts[0]), tuple(starts[1])), kept)


def _index_ranges(steps: Sequence[tuple[int, int]], low: int, high: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Products of (first, count) per dimension whose positions lie in [low, high); steps descend."""
    if not steps:
        if low <= 0 < high:
            yield ()
        return
    (size, step), rest = steps[0], steps[1:]
    extent = 1 + sum((n - 1) * s for n, s in rest)
    first = max(0, (low - extent) // step + 1)  # index i covers [i*step, i*step + extent)
    last = min(size, -(-high // step))
    full_first = max(first, -(-low // step))
    full_last = min(last, (high - extent) // step + 1)
    if full_first >= full_last:
        full_first = full_last = last
    for i in [*range(first, full_first), *range(full_last, last)]:
        for ranges in _index_ranges(rest, low - i * step, high - i * step):
            yield ((i, 1), *ranges)
    if full_first < full_last:
        yield ((full_first, full_last - full_first), *((0, n) for n, _ in rest))


def _intervals(steps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first, length) of the maximal runs that nested (size, step) dimensions cover on one axis."""
    runs = [(0, 1)]
    for size, step in sorted(steps, key=lambda s: s[1]):
        if len(runs) == 1 and runs[0][1] == step:
            runs = [(0, size * step)]
        else:
            runs = [(i * step + first, length) for i in range(size) for first, length in runs]
    return runs


def tiling_fault(boxes: Sequence[Region], shape: Sequence[int]) -> str | None:
    """None if the boxes cover every element of the shape exactly once, else the first fault in words."""
    for box in boxes:
        if any(o < 0 or s < 1 or o + s > n for o, s, n in zip(box.offsets, box.sizes, shape, strict=True)):
            return f"{box} lies outside the shape {list(shape)}"
    if len(shape) == 0:
        return None if len(boxes) == 1 else f"a scalar is covered {len(boxes)} times"
    if len(boxes) == 1 and boxes[0].sizes == tuple(shape):
        return None
    fault = _slab_fault(list(boxes), tuple(shape), 0)
    return None if fault is None else f"elements {fault[0]} are covered {fault[1]} times, not once"


def _slab_fault(boxes: list[Region], shape: tuple[int, ...], axis: int) -> tuple[str, int] | None:
    """Cuts the space along `axis` where a box begins or ends; each slab must tile the remaining axes."""
    starting: dict[int, list[int]] = {}
    ending: dict[int, list[int]] = {}
    for i, box in enumerate(boxes):
        starting.setdefault(box.offsets[axis], []).append(i)
        ending.setdefault(box.offsets[axis] + box.sizes[axis], []).append(i)
    cuts = sorted({0, shape[axis], *starting, *ending})
    active: set[int] = set()
    for low, high in pairwise(cuts):
        active.difference_update(ending.get(low, ()))
        active.update(starting.get(low, ()))
        here = f"{low}:{high}"
        if axis + 1 == len(shape):
            if len(active) != 1:
                return f"[{here}]", len(active)
        elif not active:
            return "[" + ", ".join([here] + [f"0:{n}" for n in shape[axis + 1 :]]) + "]", 0
        else:
            fault = _slab_fault([boxes[i] for i in active], shape, axis + 1)
            if fault is not None:
                return f"[{here}, {fault[0][1:]}", fault[1]
    return None


class Chunks:
    """Boxes of one tensor, found by overlap without looking at all of them."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._sorted = sorted(regions, key=lambda r: r.offsets)
        self._offsets = [r.offsets for r in self._sorted]
        self._longest = [max(sizes) for sizes in zip(*(r.sizes for r in self._sorted), strict=True)]

    def overlapping(self, region: Region) -> Iterator[tuple[Region, Region]]:
        """(chunk, its part inside the region)."""
        lead: tuple[int, ...] = ()  # where chunks and region are one layer, one expert: these are found exactly
        for offset, size, longest in zip(region.offsets, region.sizes, self._longest, strict=False):
            if size > 1 or longest > 1:
                break
            lead += (offset,)
        first, last = lead, (*lead, 1 << 62)
        if len(lead) < len(self._longest):
            axis = len(lead)
            first = (*lead, region.offsets[axis] - self._longest[axis] + 1)
            last = (*lead, region.offsets[axis] + region.sizes[axis])
        for chunk in self._sorted[bisect_left(self._offsets, first) : bisect_left(self._offsets, last)]:
            common = chunk.intersect(region)
            if common is not None:
                yield chunk, common


def identity(names: tuple[str, str], region: Region, starts: tuple[tuple[int, ...], tuple[int, ...]]) -> Piece:
    """A box moved from starts[0] of A to starts[1] of B, axes kept."""
    dims = tuple(Dim(n, (a, a), (1, 1)) for a, n in enumerate(region.sizes) if n != 1)
    return Piece(names, starts, dims)


def strides(shape: Sequence[int], unit: int = 1) -> tuple[int, ...]:
    """C-order strides, in elements or (unit = item size) in bytes."""
    result: list[int] = []
    for n in reversed(shape):
        result.append(unit)
        unit *= n
    return tuple(reversed(result))


def flatten(piece: Piece, shapes: tuple[Sequence[int], Sequence[int]], item_bytes: int) -> Piece:
    """The piece as a map of byte positions of two C-order buffers (one axis each); contiguous dims merged.

    Dims come in descending order of their step on side 0; the last one is the longest run of bytes that is
    contiguous on both sides (step 1, 1).
    """
    unit = (strides(shapes[0], item_bytes), strides(shapes[1], item_bytes))
    starts = [sum(i * u for i, u in zip(piece.starts[s], unit[s], strict=True)) for s in (0, 1)]
    dims = [(d.size, d.step[0] * unit[0][d.axis[0]], d.step[1] * unit[1][d.axis[1]]) for d in piece.dims]
    return Piece(piece.names, ((starts[0],), (starts[1],)), merge_bytes([*dims, (item_bytes, 1, 1)]))


def merge_bytes(dims: Sequence[tuple[int, int, int]]) -> tuple[Dim, ...]:
    """(size, step A, step B) of a byte map, in any order -> the shortest equal list of Dims."""
    merged: list[tuple[int, int, int]] = []
    for size, a, b in sorted((d for d in dims if d[0] != 1 or d[1:] == (1, 1)), key=lambda d: (d[1], d[2])):
        if merged and (a, b) == (merged[-1][0] * merged[-1][1], merged[-1][0] * merged[-1][2]):
            merged[-1] = (merged[-1][0] * size, *merged[-1][1:])
        else:
            merged.append((size, a, b))
    return tuple(Dim(n, (0, 0), (a, b)) for n, a, b in reversed(merged))
