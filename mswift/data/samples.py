"""Which tokens of a store each sample holds: every sample once, or those of each source by its share of a mixture."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mswift.data.cache import MOST_CHANNELS, TokenStore
from mswift.data.hashing import content_hash
from mswift.data.selection import mixture, repeated
from mswift.errors import ConfigError, DataError

ShareKind = Literal["weights", "epochs"]


@dataclass(frozen=True)
class Samples:
    """Samples in their order, as places in the tokens of a store."""

    starts: NDArray[np.int64]
    """int64 [samples]"""
    ends: NDArray[np.int64]
    """int64 [samples]"""
    fingerprint: str
    num_tokens: int
    num_trained_tokens: int
    lines: tuple[str, ...] = ()
    """What the summary says of the sources."""
    channels: NDArray[np.uint8] | None = None
    """uint8 [samples]: the place of each one's channel in `channel_names`."""
    channel_names: tuple[str, ...] = ()


def whole(store: TokenStore, max_length: int) -> Samples:
    """Every sample of the store once; a stream without a mask is cut every `max_length` tokens."""
    num_tokens = len(store.tokens)
    if store.mask is not None:
        trained = int(np.count_nonzero(store.mask))
        return Samples(
            store.offsets[:-1], store.offsets[1:], store.fingerprint, num_tokens, trained,
            channels=store.channels, channel_names=store.channel_names,
        )  # fmt: skip
    starts, ends = _cut(0, num_tokens, max_length)
    fingerprint = content_hash({"stream": store.fingerprint, "max_length": max_length})
    return Samples(starts, ends, fingerprint, num_tokens, num_tokens - 1)


def mixed(
    store: TokenStore, kind: ShareKind, numbers: Sequence[float], seed: int, max_length: int, flag: str
) -> Samples:
    """Samples of each source by its weight, or by its epochs; a stream is cut source by source.

    DataError, which calls the list of sources `flag`, for one without a sample.
    """
    starts, ends, bounds = _cut_by_source(store, max_length)
    sizes = [after - before for before, after in pairwise([0, *bounds])]
    if 0 in sizes:
        raise DataError(f"{flag}: source {sizes.index(0) + 1} has no sample; leave it out")
    chosen = mixture(sizes, numbers, seed) if kind == "weights" else repeated(sizes, numbers, seed)
    word = "weight" if kind == "weights" else kind
    lines = [
        f"source {i}: {word} {number:g}, {len(rows):,} of {size:,} samples ({len(rows) / size:.3g} times)"
        for i, (number, rows, size) in enumerate(zip(numbers, chosen, sizes, strict=True), start=1)
    ]
    if kind == "epochs" and (none := [i for i, rows in enumerate(chosen) if not len(rows)]):
        raise DataError(
            f"{flag}: {lines[none[0]]}: too few epochs for one sample; give it {1 / sizes[none[0]]:.3g} or more, or "
            "leave it out"
        )
    ids = np.concatenate([rows + first for rows, first in zip(chosen, [0, *bounds], strict=False)])
    lengths = (ends - starts - 1)[ids]
    trained = int(lengths.sum())
    if store.mask is not None:
        trained = int(np.add.reduceat(store.mask != 0, starts, dtype=np.int64)[ids].sum())
    parts = {kind: list(numbers), "seed": seed, "max_length": max_length}
    fingerprint = content_hash({"store": store.fingerprint, **parts})
    return Samples(
        starts[ids], ends[ids], fingerprint, int(lengths.sum()) + len(ids), trained, tuple(lines),
        None if store.channels is None else store.channels[ids], store.channel_names,
    )  # fmt: skip


def by_source(store: TokenStore, max_length: int, specs: Sequence[str]) -> Samples:
    """Every sample of the store once, with its source for a channel. Sources are cut on their own."""
    starts, ends, bounds = _cut_by_source(store, max_length)
    names = [Path(spec).name for spec in specs]
    names = list(specs if len(set(names)) < len(names) else names)
    if len(set(names)) < len(names) or len(names) > MOST_CHANNELS:
        raise ConfigError(
            f"--val_dataset: {len(names)} files of {len(set(names))} names, and the loss of each is reported under its "
            f"name: give every file once, and {MOST_CHANNELS} at most"
        )
    every = whole(store, max_length)
    sizes = np.diff([0, *bounds])
    trained = every.num_trained_tokens if store.mask is not None else int((ends - starts - 1).sum())
    channels = np.repeat(np.arange(len(sizes), dtype=np.uint8), sizes)
    fingerprint = content_hash({"samples": every.fingerprint, "by_source": True})
    return Samples(starts, ends, fingerprint, every.num_tokens, trained, (), channels, tuple(names))


def _cut_by_source(store: TokenStore, max_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Starts and ends of samples, those of every source on their own, and how many there are up to the end of each."""
    if store.mask is not None:
        return store.offsets[:-1], store.offsets[1:], [pieces for pieces, _ in store.report["source_ends"]]
    tokens = [0, *(tokens for _, tokens in store.report["source_ends"])]
    cuts = [_cut(*edges, max_length) for edges in pairwise(tokens)]
    starts, ends = (np.concatenate(edges) for edges in zip(*cuts, strict=True))
    return starts, ends, list(accumulate(len(cut[0]) for cut in cuts))


def _cut(first: int, last: int, max_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and ends of the samples of a stream that lies at [first, last)."""
    starts = np.arange(first, last - 1, max_length, dtype=np.int64)
    return starts, np.minimum(starts + max_length + 1, last)
