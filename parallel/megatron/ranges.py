"""Flat ranges of a C-order tensor as boxes: pure arithmetic, no torch."""

from collections.abc import Iterator, Sequence
from math import prod

from mswift.converters.layout import Region


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Region]:
    """Boxes whose concatenated elements are elements start..stop-1 of the tensor, each contiguous, in order.

    At most 2 * rank - 1 of them.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Region((start,) * len(shape), (stop - start,) * len(shape))
        return
    row = prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        yield from _inside(shape, first, start - first * row, stop - first * row)
        return
    whole_first = first if start == first * row else first + 1
    whole_last = last + 1 if stop == (last + 1) * row else last
    if whole_first > first:
        yield from _inside(shape, first, start - first * row, row)
    if whole_last > whole_first:
        yield Region((whole_first, *(0 for _ in shape[1:])), (whole_last - whole_first, *shape[1:]))
    if whole_last <= last:
        yield from _inside(shape, last, 0, stop - last * row)


def _inside(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Region]:
    for box in boxes_of_range(shape[1:], start, stop):
        yield Region((index, *box.offsets), (1, *box.sizes))


def flat_offset(shape: Sequence[int], offsets: Sequence[int]) -> int:
    """Position of an index in C order."""
    position = 0
    for size, offset in zip(shape, offsets, strict=True):
        position = position * size + offset
    return position
