"""Which positions of which documents a rank of a context-parallel group holds, and in which order.

A document of n positions is cut in 2 * cp equal chunks; rank r holds chunks r and 2 * cp - 1 - r, so that under a
causal mask every rank has as much to compute. A rank's rows are its two chunks of the first document, then those of
the second, and so on. *Natural order* is document after document, position after position.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """A run of positions of one document, on rows that follow each other."""

    document: int
    row: int
    position: int
    length: int


@dataclass(frozen=True)
class Share:
    """The rows of `ranks`, one rank's after the other's, of a context-parallel group of `size` ranks.

    lengths: positions of every document; with several ranks each is a multiple of 2 * size. One rank: natural order.
    """

    lengths: tuple[int, ...]
    ranks: tuple[int, ...] = (0,)
    size: int = 1

    def of(self, *ranks: int) -> "Share":
        """The rows of other ranks of the same group."""
        return Share(self.lengths, ranks, self.size)


def share_of(rows: int, rank: int, size: int, packed: object | None) -> Share | None:
    """The share of a rank that has `rows` rows; None: one whole document.

    packed: has the `lengths` of the documents (`mswift.parallel.megatron.documents`); None: a row is one document.
    """
    if packed is not None:
        return Share(packed.lengths, (rank,), size)  # type: ignore[attr-defined]
    return Share((rows * size,), (rank,), size) if size > 1 else None


@lru_cache(maxsize=256)
def segments(share: Share) -> tuple[Segment, ...]:
    """The rows of a share, in their order; chunks that follow each other are one segment."""
    found: list[Segment] = []
    row = 0
    for rank in share.ranks:
        for document, length in enumerate(share.lengths):
            for position, count in _chunks(length, rank, share.size):
                last = found[-1] if found else None
                if last is not None and (last.document, last.position + last.length) == (document, position):
                    found[-1] = last._replace(length=last.length + count)
                else:
                    found.append(Segment(document, row, position, count))
                row += count
    return tuple(found)


def _chunks(length: int, rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """(first position, number) of what a rank holds of a document."""
    if size == 1:
        return ((0, length),)
    chunk, rest = divmod(length, 2 * size)
    assert rest == 0, (length, size)
    return tuple((number * chunk, chunk) for number in (rank, 2 * size - 1 - rank))


@lru_cache(maxsize=32)
def natural_rows(share: Share, device: torch.device) -> Tensor:
    """int64 [rows]: where every row of the share lies in natural order."""
    starts = list(accumulate(share.lengths, initial=0))
    parts = [torch.arange(s.position, s.position + s.length) + starts[s.document] for s in segments(share)]
    return torch.cat(parts).to(device)


@lru_cache(maxsize=32)
def rows_in_order(share: Share, device: torch.device) -> Tensor:
    """int64 [rows] of a share of all ranks: rows[natural_order] are in natural order."""
    return torch.argsort(natural_rows(share, torch.device("cpu"))).to(device)


@lru_cache(maxsize=32)
def positions(share: Share, device: torch.device) -> Tensor:
    """int64 [rows]: the position of every row in its document."""
    return torch.cat([torch.arange(s.position, s.position + s.length) for s in segments(share)]).to(device)
