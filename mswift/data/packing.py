"""Which samples share a row: a pure function of their lengths, in positions, and of the row's capacity.

No sample is cut and none is left out. Padding that a layout asks for is added at run time, so that packs do not depend
on it. `bestfit` is best-fit decreasing (D. S. Johnson et al., SIAM J. Comput. 3, 1974): the longest sample first, each
into the fullest row that has room for it. Lengths are whole numbers, so rows with the same room left are one class and
samples of one length go to a class together; the work is that of sorting. `sequential` fills one row after the other,
and so does `concat-and-split`, whose samples were cut where rows end (`samples.Cut`).
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Strategy = Literal["bestfit", "sequential", "concat-and-split"]


@dataclass(frozen=True)
class Packs:
    """Pack i holds the samples members[offsets[i] : offsets[i + 1]]."""

    members: NDArray[np.int64]
    """int64 [samples]; every sample once."""
    offsets: NDArray[np.int64]
    """int64 [packs + 1]"""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Samples of one pack, int64 [n]."""
        return self.members[self.offsets[index] : self.offsets[index + 1]]

    def sums(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sum over every pack of a value [samples] that each sample has; int64 [packs]."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(values[self.members], self.offsets[:-1])


def pack(lengths: NDArray[np.int64], capacity: int, strategy: Strategy) -> Packs:
    """Packs of at most `capacity` positions. lengths: int64 [samples], 1 or more each.

    ValueError for a sample that no pack holds.
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"samples of {lengths.min()} to {lengths.max()} positions in packs of {capacity}")
    if strategy != "bestfit":
        return _sequential(lengths, capacity)
    longest_first = np.argsort((capacity - lengths).astype(np.min_scalar_type(capacity)), kind="stable")
    rows = _best_fit(np.bincount(lengths), capacity, len(lengths))
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.bincount(rows).cumsum()])
    return Packs(longest_first[np.argsort(rows, kind="stable")], offsets)


def _sequential(lengths: NDArray[np.int64], capacity: int) -> Packs:
    """The next sample goes to the last row, or to a new one where it has no room."""
    ends = np.concatenate([np.zeros(1, dtype=np.int64), lengths.cumsum()])
    following = memoryview(np.searchsorted(ends, ends[:-1] + capacity, side="right") - 1)
    offsets = [0]
    while offsets[-1] < len(lengths):
        offsets.append(following[offsets[-1]])
    return Packs(np.arange(len(lengths), dtype=np.int64), np.array(offsets, dtype=np.int64))


def _best_fit(counts: NDArray[np.int64], capacity: int, num_samples: int) -> NDArray[np.int64]:
    """Row of every sample, the longest first, int64 [samples]; counts[n]: samples of n positions."""
    rows = np.empty(num_samples, dtype=np.int64)
    filled = 0
    for first, number, each in _placements(counts, capacity):
        end = filled + number * each
        rows[filled:end] = np.arange(first, first + number).repeat(each)
        filled = end
    return rows


def _placements(counts: NDArray[np.int64], capacity: int) -> Iterator[tuple[int, int, int]]:
    """(first row, number of rows, samples that each of them gets), for the samples from the longest on.

    A row that is the fullest with room for a sample stays so for samples of the same length until it has no room.
    """
    classes: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # room left -> (first row, number of rows)
    rooms = 0  # bit r: there is a row with room for r positions
    num_rows = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                first, number = classes[room].pop()
            else:
                room, first, number = capacity, num_rows, max(left // (capacity // length), 1)
                num_rows += number
            each = min(room // length, left)
            used = min(number, left // each)
            yield first, used, each
            left -= used * each
            if used < number:
                classes[room].append((first + used, number - used))
            elif not classes[room]:
                rooms &= ~(1 << room)
            rest = room - each * length
            classes[rest].append((first, used))
            rooms |= 1 << rest
