"""Parameters and optimizer state of this rank as boxes of global tensors, both ways: any layout writes, any reads."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mswift.converters.layout import Region
from mswift.errors import CheckpointError
from mswift.parallel.engine import Read, StateShard, bytes_of
from mswift.parallel.mapped import Mapped, read_rows, shards
from mswift.parallel.megatron.placement import Part, Placed
from mswift.parallel.megatron.ranges import boxes_of_range, flat_offset

ByNames = Callable[[Part], Mapped]
"""Of a part of a parameter: its global tensor in boxes of others (`mswift.parallel.megatron.part`)."""


def shards_of_range(
    placed: Placed, flat: Tensor, start: int, stop: int, prefix: str = "", by_names: ByNames | None = None
) -> Iterator[StateShard]:
    """Elements start..stop-1 of a parameter as boxes of its global tensor, or of those that `by_names` says.

    `flat` holds those elements, [stop - start]. Padded vocabulary rows are left out.
    """
    for part, inside in _boxes(placed, start, stop):
        first = flat_offset(placed.parameter.shape, inside.offsets) - start
        values, region = flat[first : first + inside.num_elements], _global_region(part, inside)
        if by_names is None:
            yield StateShard(prefix + part.key, part.shape, region, values)
        else:
            yield from shards(by_names(part), region, values, prefix)


def read_range(
    placed: Placed,
    flat: Tensor,
    start: int,
    stop: int,
    read: Read,
    prefix: str = "",
    dtype: torch.dtype | None = None,
    by_names: ByNames | None = None,
) -> None:
    """Fill `flat` [stop - start] with elements start..stop-1 of a parameter; padded rows become zero.

    `dtype` is what `read` delivers, if it is not that of `flat`. Raises CheckpointError unless every element was set
    exactly once.
    """
    count = 0
    flat.zero_()
    for part, inside in _boxes(placed, start, stop):
        first = flat_offset(placed.parameter.shape, inside.offsets) - start
        values = torch.empty(inside.num_elements, dtype=dtype or flat.dtype)
        region = _global_region(part, inside)
        if by_names is None:
            read(prefix + part.key, region, bytes_of(values))
        else:
            read_rows(by_names(part), region, values, read, prefix)
        flat[first : first + inside.num_elements].copy_(values)
        count += inside.num_elements
    expected = sum(_overlap(placed, part, start, stop) for part in placed.parts)
    if count != expected:
        raise CheckpointError(f"{prefix}{placed.key}: {count} elements read for {expected} of this rank")


def _boxes(placed: Placed, start: int, stop: int) -> Iterator[tuple[Part, Region]]:
    """(part, contiguous box of the local tensor) pairs of a flat range."""
    local = tuple(placed.parameter.shape)
    for box in boxes_of_range(local, start, stop):
        for part in placed.parts:
            common = box.intersect(_local_region(placed, part))
            if common is not None:
                yield part, common


def _local_region(placed: Placed, part: Part) -> Region:
    """The box of the local tensor that a part fills."""
    sizes = part.region.sizes[-placed.parameter.dim() :]
    return Region((part.first_row, *(0 for _ in sizes[1:])), sizes)


def _global_region(part: Part, inside: Region) -> Region:
    """A box of the local tensor, inside one part, as a box of the global tensor."""
    moved = list(inside.offsets)
    moved[0] -= part.first_row
    lead = len(part.shape) - len(moved)  # 1 where layers are stacked
    offsets = part.region.offsets
    tail = tuple(o + m for o, m in zip(offsets[lead:], moved, strict=True))
    return Region((*offsets[:lead], *tail), (*(1 for _ in range(lead)), *inside.sizes))


def _overlap(placed: Placed, part: Part, start: int, stop: int) -> int:
    """Elements of a part inside a flat range: rows are contiguous, so it is an intersection of two intervals."""
    row = placed.parameter.shape[1:].numel()
    first = part.first_row * row
    return max(0, min(stop, first + part.region.num_elements) - max(start, first))
