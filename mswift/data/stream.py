"""A data set that is tokenised while it is trained on, block by block, and never held whole.

A block is the next rows of the sources in file order, as many as its bounds allow, never beyond the end of an epoch.
Its samples (or packs of them) are seen in an order drawn from (seed, number of the block); the block after it is made
meanwhile. With weights every source is a stream of its own, and the next sample comes from the one that lags most
behind its share. Where a stream stands is a few integers: epoch, number and first row of the block, samples before it
and out of it. Nothing about ranks or layouts enters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mswift.data.batch import Sample
from mswift.data.order import sample_ids
from mswift.data.packed import Stored, Window
from mswift.data.places import Place
from mswift.data.stream_blocks import Block, BlockReader
from mswift.errors import DataError

State = Mapping[str, Any]
RowsOf = Callable[[int, Block], Stored | None]
"""The samples or packs of a block, by its number; None where it has none."""
BEGIN: State = {"epoch": 0, "block": 0, "place": asdict(Place()), "first": 0, "taken": 0}
_KEPT_WINDOWS = 8


class SourceStream:
    """The rows of one stream, epoch after epoch."""

    def __init__(
        self, blocks: BlockReader, rows_of: Callable[[int, Block], Stored | None], seed: int, name: str
    ) -> None:
        """`rows_of` gives the samples or packs of a block by its number, None: none; `name` is for errors."""
        self.blocks, self._rows_of, self._seed, self._name = blocks, rows_of, seed, name
        self._open: Block | None = None
        self._rows: Stored | None = None
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.start(BEGIN)

    def start(self, state: State) -> None:
        """Go on from what `state` said."""
        self._epoch, self._block = int(state["epoch"]), int(state["block"])
        self._first, self._taken = int(state["first"]), int(state["taken"])
        self._place = Place(**state["place"])

    def begin(self) -> None:
        """Have blocks made."""
        self.blocks.begin(self._block, self._place)

    @property
    def consumed(self) -> int:
        """Rows that were taken since the beginning."""
        return self._first + self._taken

    def state(self) -> State:
        """See `start`."""
        return {
            "epoch": self._epoch, "block": self._block, "place": asdict(self._place), "first": self._first,
            "taken": self._taken,
        }  # fmt: skip

    def take(self) -> tuple[int, Stored, int]:
        """The next row: its number since the beginning in file order, and where it is."""
        empty_epochs = 0
        while self._rows is None or self._taken == len(self._rows):
            if self._open is not None:
                empty_epochs += self._open.ends_epoch and self._rows is None
                self._next_block(self._open)
            if empty_epochs > 1:
                raise DataError(
                    f"{self._name}: no row gave a sample in a whole pass: raise --max_length where all are too long; "
                    "what was wrong with bad rows is in rejected.jsonl in --output_dir"
                )
            self._open_block()
            self._check_place()
        index = int(self._order[self._taken])
        self._taken += 1
        return self._first + index, self._rows, index

    def _check_place(self) -> None:
        """A run stands in its block where it stood when it was saved, so the block has as many rows as then."""
        found = 0 if self._rows is None else len(self._rows)
        if self._taken > found:
            raise DataError(
                f"{self._name}: the run has taken {self._taken:,} samples of data block {self._block}, which has only "
                f"{found:,} now: its rows changed while their files kept size, beginning and end; bring the files back "
                "or start a new run in another --output_dir"
            )

    def _next_block(self, block: Block) -> None:
        self._first += 0 if self._rows is None else len(self._rows)
        self._taken, self._block = 0, self._block + 1
        self._epoch += block.ends_epoch
        self._place = Place() if block.ends_epoch else block.end

    def _open_block(self) -> None:
        self._open = self.blocks.open(self._block)
        self._rows = self._rows_of(self._block, self._open)
        if self._rows is not None:
            count = len(self._rows)
            self._order = sample_ids(count, self._seed, self._block * count, count)


class StreamDataset:
    """Streams, mixed by their weights, as a run reads them: window by window, each behind the one before."""

    channel_names: tuple[str, ...] = ()

    def __init__(
        self, streams: Sequence[SourceStream], weights: Sequence[float], fingerprint: str, summary: str
    ) -> None:
        """One weight a stream; `fingerprint` is the hash of all that decides the samples."""
        self._streams = list(streams)
        total = sum(weights)
        self._shares = [weight / total for weight in weights]
        self.fingerprint, self.summary = fingerprint, summary
        self._windows: list[Window] = []
        self._states: dict[int, list[State]] = {}
        self._next = 0

    def start(self, consumed: int, states: Sequence[State] | None) -> None:
        """Begin where a run stands that has consumed so many rows; `states` as `state_at` gave them (None: at 0)."""
        for stream, state in zip(self._streams, states or [BEGIN] * len(self._streams), strict=True):
            stream.start(state)
            stream.begin()
        self._next = consumed
        self._states = {consumed: [stream.state() for stream in self._streams]}

    def window(self, consumed: int, count: int) -> Window:
        """The `count` rows behind the `consumed` first. ValueError: they do not follow those that were read last."""
        if consumed != self._next:
            raise ValueError(f"a stream that stands at {self._next} cannot be read at {consumed}")
        found = []
        for _ in range(count):
            number = self._most_behind()
            row, rows, index = self._streams[number].take()
            found.append((row * len(self._streams) + number, rows, index))
        self._next = consumed + count
        self._states[self._next] = [stream.state() for stream in self._streams]
        self._windows = [*self._windows, window := Window(found)][-_KEPT_WINDOWS:]
        return window

    def _most_behind(self) -> int:
        counts = [stream.consumed for stream in self._streams]
        due = sum(counts) + 1
        return max(range(len(counts)), key=lambda n: (self._shares[n] * due - counts[n], -n))

    def state_at(self, consumed: int) -> list[State]:
        """Where the streams stand after so many rows, which a window ended with and `finished` has not passed."""
        return self._states[consumed]

    def epoch_at(self, consumed: int) -> int:
        """Whole passes over the slowest stream."""
        return min(int(state["epoch"]) for state in self._states[consumed])

    def finished(self, consumed: int) -> None:
        """All ranks have read that far: blocks and states behind are given up."""
        for stream, state in zip(self._streams, self._states[consumed], strict=True):
            stream.blocks.remove(state["block"])
        for place in [place for place in list(self._states) if place < consumed]:  # a thread adds to them
            del self._states[place]

    def row(self, number: int) -> dict[int, Sample]:
        """The samples of a row of one of the last windows, by the row's number. KeyError for any other."""
        for window in self._windows:
            if number in window.numbers:
                return window.row(window.numbers.index(number))
        raise KeyError(number)

    def close(self) -> None:
        """Remove what was made ahead."""
        for stream in self._streams:
            stream.blocks.close()


def num_samples(data: Stored | StreamDataset) -> int:
    """Samples (packs) of a data set; 0 of a stream, whose number nobody knows."""
    return 0 if isinstance(data, StreamDataset) else len(data)


def epoch_at(data: Stored | StreamDataset, consumed: int) -> float:
    """Passes over the data after so many samples; whole ones of a stream."""
    return data.epoch_at(consumed) if isinstance(data, StreamDataset) else consumed / len(data)
