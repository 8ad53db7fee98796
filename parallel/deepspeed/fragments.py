"""ZeRO cuts flattened parameters anywhere: which boxes of a tensor a run of its elements fills."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from mswift.converters.layout import Region


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to start + count of a flattened parameter; they lie in `flat` from `offset` on."""

    start: int
    count: int
    flat: Tensor
    offset: int = 0

    def of(self, like: Tensor) -> Tensor:
        """The same elements of a tensor that is laid out as `flat` is."""
        return like.view(-1)[self.offset : self.offset + self.count]

    @property
    def values(self) -> Tensor:
        """[count], a view."""
        return self.of(self.flat.detach())


def flat_boxes(shape: Sequence[int], start: int, count: int) -> Iterator[tuple[Region, int]]:
    """(box, where it begins in the run) of `count` elements from `start` on of a tensor in C order."""
    if len(shape) < 2:
        if count:
            yield Region((start,), (count,)), 0
        return
    inner, done = prod(shape[1:]), 0
    while done < count:
        row, skipped = divmod(start + done, inner)
        rows = (count - done) // inner
        if skipped == 0 and rows:
            yield Region((row, *(0 for _ in shape[1:])), (rows, *shape[1:])), done
            done += rows * inner
            continue
        part = min(inner - skipped, count - done)
        for box, offset in flat_boxes(shape[1:], skipped, part):
            yield Region((row, *box.offsets), (1, *box.sizes)), done + offset
        done += part
