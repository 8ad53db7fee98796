"""Which rows of a source are used: seeded draws (`PATH#N`), the validation split, and the shares of a mixture.

Draws are pure functions of (number of rows, seed, position of the source): Philox's raw words, whose stream numpy keeps
fixed for ever, sorted stably. Rows keep the order of their file; a row that is drawn twice comes twice in a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mswift.data.formats import Record
from mswift.data.sources import Part, Source

Method = Literal["without_replacement", "with_replacement", "first"]
_WORD = 2**64
_DRAW, _SPLIT, _MIXTURE = range(3)  # separate streams of one seed


@dataclass(frozen=True)
class Selection:
    """How rows are chosen from every source of a list."""

    method: Method = "first"
    """`PATH#N`: N rows drawn by the seed, without replacement (more than there are: all of them, N // rows times, and
    the rest drawn) or with it; or the first N."""
    seed: int = 0
    split_ratio: float = 0.0
    """This share of the rows of each source is set apart for validation."""
    part: Literal["train", "validation"] = "train"


def selected_parts(
    source: Source, index: int, selection: Selection
) -> Iterator[tuple[Part, int | None, Iterator[Record]]]:
    """The parts of a source, each with its number of rows (None: not counted) and those of them that are used.

    `index`: the position of the source in its list. Rows are counted first where the choice depends on their number.
    """
    if selection.split_ratio == 0 and (source.count is None or selection.method == "first"):
        left = source.count
        for part in source.parts:
            if left == 0:
                return
            records = part.records() if left is None else islice(part.records(), left)
            counted = _Counted(records)
            yield part, None, counted
            left = None if left is None else left - counted.number
        return
    sizes = [part.num_rows() for part in source.parts]
    chosen = chosen_rows(sum(sizes), source.count, index, selection)
    first = 0
    for part, size in zip(source.parts, sizes, strict=True):
        edges = np.searchsorted(chosen, [first, first + size])
        yield part, size, _pick(part.records(), chosen[edges[0] : edges[1]] - first)
        first += size


class _Counted:
    """Records, and how many were taken."""

    def __init__(self, records: Iterator[Record]) -> None:
        self._records = records
        self.number = 0

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        record = next(self._records)
        self.number += 1
        return record


def _pick(records: Iterator[Record], rows: NDArray[np.int64]) -> Iterator[Record]:
    """Records at the sorted positions `rows`, as often as each is in them; reads no further than the last."""
    position = -1
    record: Record | None = None
    for row in rows.tolist():
        while position < row:
            record = next(records)
            position += 1
        assert record is not None
        yield record


def chosen_rows(num_rows: int, count: int | None, index: int, selection: Selection) -> NDArray[np.int64]:
    """Rows of a source of `num_rows` that are used, int64, sorted, with repetitions."""
    drawn = np.arange(num_rows, dtype=np.int64)
    if count is not None:
        drawn = np.sort(draw(num_rows, count, selection.method, _key(selection.seed, _DRAW, index)))
    if selection.split_ratio == 0:
        return drawn
    distinct = np.unique(drawn)
    size = round(len(distinct) * selection.split_ratio)
    validation = np.sort(distinct[_order(len(distinct), _key(selection.seed, _SPLIT, index))[:size]])
    return validation if selection.part == "validation" else drawn[~np.isin(drawn, validation)]


def draw(size: int, count: int, method: Method, key: Sequence[int]) -> NDArray[np.int64]:
    """`count` of `size` numbers from 0, int64 [count], in no order."""
    if size == 0:
        return np.empty(0, dtype=np.int64)
    if method == "first":
        return np.arange(min(size, count), dtype=np.int64)
    if method == "with_replacement":
        words = np.random.Philox(key=np.array(key, dtype=np.uint64)).random_raw(count)
        return np.asarray(words % np.uint64(size)).astype(np.int64)
    whole, rest = divmod(count, size)
    return np.concatenate([*repeat(np.arange(size, dtype=np.int64), whole), _order(size, key)[:rest]])


def mixture(sizes: Sequence[int], weights: Sequence[float], seed: int) -> list[NDArray[np.int64]]:
    """Samples of each source in one epoch of a mixture, sorted: as many in all as there are, shared out by `weights`.

    A source with fewer than its share is repeated, one with more gives a seeded part. Shares are rounded so that their
    sum stays, the largest remainders up.
    """
    total = sum(sizes)
    exact = np.array(weights, dtype=np.float64) / sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    for i in np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]:
        shares[i] += 1
    return _drawn(sizes, shares.tolist(), seed)


def repeated(sizes: Sequence[int], epochs: Sequence[float], seed: int) -> list[NDArray[np.int64]]:
    """Samples of each source, sorted, epochs x size of them (halves up): all of them whole times, the rest drawn."""
    return _drawn(sizes, [int(size * often + 0.5) for size, often in zip(sizes, epochs, strict=True)], seed)


def _drawn(sizes: Sequence[int], counts: Sequence[int], seed: int) -> list[NDArray[np.int64]]:
    return [
        np.sort(draw(size, count, "without_replacement", _key(seed, _MIXTURE, index)))
        for index, (size, count) in enumerate(zip(sizes, counts, strict=True))
    ]


def _order(size: int, key: Sequence[int]) -> NDArray[np.int64]:
    words = np.random.Philox(key=np.array(key, dtype=np.uint64)).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def _key(seed: int, purpose: int, index: int) -> tuple[int, int]:
    """Apart from the keys (seed, epoch) of the order of samples, whose second word is small."""
    return seed % _WORD, (1 << 63) + (purpose << 32) + index
