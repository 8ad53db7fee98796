"""Rows of several samples that do not see each other, over a data set of samples."""

from collections.abc import Sequence

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from mswift.data.batch import Sample
from mswift.data.dataset import TokenDataset
from mswift.data.hashing import content_hash
from mswift.data.packing import Strategy, pack


class PackedDataset:
    """Packs in a fixed order; a step counts in packs as it counts in samples where nothing is packed."""

    def __init__(self, samples: TokenDataset, capacity: int, strategy: Strategy) -> None:
        """Packs of at most `capacity` positions; ValueError for a longer sample."""
        self.samples = samples
        self.channel_names = samples.channel_names
        """As of its samples."""
        self.packs = pack(samples.lengths, capacity, strategy)
        self.lengths = self.packs.sums(samples.lengths)
        """int64 [packs]; positions each pack fills in a row."""
        self.squares = self.packs.sums(samples.lengths**2)
        """int64 [packs]; sum of the squares of its samples' positions: what its attention costs."""
        digest = blake3(self.packs.members.view(np.uint8)).update(self.packs.offsets.view(np.uint8)).hexdigest()
        self.fingerprint = content_hash({"samples": samples.fingerprint, "packs": digest})
        """Hash of the packs and their samples."""
        filled = int(self.lengths.sum()) / (len(self) * capacity)
        self.summary = (
            f"{samples.summary}\n{len(self):,} packs of at most {capacity:,} positions ({strategy}), "
            f"{len(samples) / len(self):.3g} samples each, {filled:.2%} filled, {1 - filled:.2%} padding"
        )

    def __len__(self) -> int:
        return len(self.packs)

    def row(self, index: int) -> dict[int, Sample]:
        """The samples of pack `index` by their ids, in the order in which they lie in its row."""
        return {number: self.samples.sample(number) for number in self.packs[index].tolist()}

    def sample_lengths(self, index: int) -> NDArray[np.int64]:
        """Positions of each sample of pack `index`, int64."""
        return self.samples.lengths[self.packs[index]]


class Window:
    """Rows of a stream that follow each other: samples of some blocks, or packs of them."""

    channel_names: tuple[str, ...] = ()

    def __init__(self, rows: Sequence[tuple[int, TokenDataset | PackedDataset, int]]) -> None:
        """The number of each row in its stream, and where it is."""
        self.numbers = [number for number, _, _ in rows]
        self._rows = [(data, index) for _, data, index in rows]
        self.lengths = np.array([data.lengths[index] for data, index in self._rows], dtype=np.int64)
        """int64 [rows]; positions that each fills in a batch."""
        self.packed = any(isinstance(data, PackedDataset) for data, _ in self._rows)
        self.squares = np.array([squared_lengths(data, [index])[0] for data, index in self._rows], dtype=np.int64)

    def row(self, index: int) -> dict[int, Sample]:
        """The samples of row `index` of the window; those of a pack by their numbers in its block."""
        data, place = self._rows[index]
        return data.row(place)

    def sample_lengths(self, index: int) -> NDArray[np.int64]:
        """Positions of each sample of row `index`, int64."""
        data, place = self._rows[index]
        return data.sample_lengths(place) if isinstance(data, PackedDataset) else data.lengths[[place]]


Stored = TokenDataset | PackedDataset
"""A data set that is there as a whole."""
Dataset = Stored | Window
"""What batches are made of."""


def samples_of(data: Stored) -> TokenDataset:
    """The samples themselves."""
    return data.samples if isinstance(data, PackedDataset) else data


def is_packed(data: Dataset) -> bool:
    """Whether its rows hold several samples."""
    return data.packed if isinstance(data, Window) else isinstance(data, PackedDataset)


def squared_lengths(data: Dataset, ids: Sequence[int]) -> NDArray[np.int64]:
    """Sum of the squares of the samples' positions in each of these rows (samples or packs); int64 [ids]."""
    return data.lengths[ids] ** 2 if isinstance(data, TokenDataset) else data.squares[ids]
