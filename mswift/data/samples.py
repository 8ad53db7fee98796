"""Which tokens of a store each sample holds: every sample once, or those of each source by its share of a mixture.

How the stream of `pt` becomes samples is a `Cut`: `joined` cuts it every `length` tokens, whatever stands there.
`documents` and `rows` keep documents apart: a sample holds tokens of one, of which n fill n - 1 positions. `documents`
cuts each of them every `length` positions; `rows` puts the positions of all documents in one line and cuts that, at
the documents and every `length`, so that rows of `length` are filled by whole samples in their order.
"""

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
CutKind = Literal["joined", "documents", "rows"]


@dataclass(frozen=True)
class Cut:
    """How a stream becomes samples."""

    length: int
    """Most positions of a sample."""
    kind: CutKind = "joined"

    def identity(self) -> dict[str, object]:
        """What a fingerprint has of it."""
        return {"max_length": self.length} | ({} if self.kind == "joined" else {"cut": self.kind})


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


def whole(store: TokenStore, cut: Cut) -> Samples:
    """Every sample of the store once; a stream without a mask is cut as `cut` says."""
    num_tokens = len(store.tokens)
    if store.mask is not None:
        return Samples(
            store.offsets[:-1], store.offsets[1:], store.fingerprint, num_tokens, store.num_trained_tokens,
            channels=store.channels, channel_names=store.channel_names,
        )  # fmt: skip
    starts, ends = _cut(store, 0, num_tokens, cut)
    fingerprint = content_hash({"stream": store.fingerprint, **cut.identity()})
    return Samples(starts, ends, fingerprint, num_tokens, int((ends - starts - 1).sum()), _left_out(store, cut))


def mixed(store: TokenStore, kind: ShareKind, numbers: Sequence[float], seed: int, cut: Cut, flag: str) -> Samples:
    """Samples of each source by its weight, or by its epochs; a stream is cut source by source.

    DataError, which calls the list of sources `flag`, for one without a sample.
    """
    starts, ends, bounds = _cut_by_source(store, cut)
    sizes = [after - before for before, after in pairwise([0, *bounds])]
    if 0 in sizes:
        raise DataError(f"{flag}: source {sizes.index(0) + 1} has no sample; leave it out")
    chosen = mixture(sizes, numbers, seed) if kind == "weights" else repeated(sizes, numbers, seed)
    word = "weight" if kind == "weights" else kind
    lines = [
        f"source {i}: {word} {number:g}, {len(rows):,} of {size:,} samples ({len(rows) / size:.3g} times)"
        for i, (number, rows, size) in enumerate(zip(numbers, chosen, sizes, strict=True), start=1)
    ]
    lines += _left_out(store, cut)
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
    parts = {kind: list(numbers), "seed": seed, **cut.identity()}
    fingerprint = content_hash({"store": store.fingerprint, **parts})
    return Samples(
        starts[ids], ends[ids], fingerprint, int(lengths.sum()) + len(ids), trained, tuple(lines),
        None if store.channels is None else store.channels[ids], store.channel_names,
    )  # fmt: skip


def by_source(store: TokenStore, cut: Cut, specs: Sequence[str]) -> Samples:
    """Every sample of the store once, with its source for a channel. Sources are cut on their own."""
    starts, ends, bounds = _cut_by_source(store, cut)
    names = [Path(spec).name for spec in specs]
    names = list(specs if len(set(names)) < len(names) else names)
    if len(set(names)) < len(names) or len(names) > MOST_CHANNELS:
        raise ConfigError(
            f"--val_dataset: {len(names)} files of {len(set(names))} names, and the loss of each is reported under its "
            f"name: give every file once, and {MOST_CHANNELS} at most"
        )
    every = whole(store, cut)
    sizes = np.diff([0, *bounds])
    trained = every.num_trained_tokens if store.mask is not None else int((ends - starts - 1).sum())
    channels = np.repeat(np.arange(len(sizes), dtype=np.uint8), sizes)
    fingerprint = content_hash({"samples": every.fingerprint, "by_source": True})
    return Samples(starts, ends, fingerprint, every.num_tokens, trained, every.lines, channels, tuple(names))


def _left_out(store: TokenStore, cut: Cut) -> tuple[str, ...]:
    """What the summary says of documents in which nothing is predicted."""
    count = 0 if store.mask is not None or cut.kind == "joined" else int(np.count_nonzero(np.diff(store.offsets) == 1))
    return (f"{count:,} documents of one token teach nothing by themselves and are left out",) if count else ()


def _cut_by_source(store: TokenStore, cut: Cut) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Starts and ends of samples, those of every source on their own, and how many there are up to the end of each."""
    if store.mask is not None:
        return store.offsets[:-1], store.offsets[1:], [pieces for pieces, _ in store.report["source_ends"]]
    tokens = [0, *(tokens for _, tokens in store.report["source_ends"])]
    cuts = [_cut(store, *edges, cut) for edges in pairwise(tokens)]
    starts, ends = (np.concatenate(edges) for edges in zip(*cuts, strict=True))
    return starts, ends, list(accumulate(len(cut[0]) for cut in cuts))


def _cut(store: TokenStore, first: int, last: int, cut: Cut) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and ends of the samples of the stream, or of the documents, that lie at [first, last)."""
    if cut.kind == "joined":
        starts = np.arange(first, last - 1, cut.length, dtype=np.int64)
        return starts, np.minimum(starts + cut.length + 1, last)
    edges = store.offsets[slice(*np.searchsorted(store.offsets, (first, last + 1)))]
    starts, counts = edges[:-1], np.diff(edges) - 1
    starts, counts = starts[counts > 0], counts[counts > 0]  # of a single token nothing is predicted
    begins = np.zeros_like(counts) if cut.kind == "documents" else np.cumsum(counts) - counts
    return _cut_documents(starts, counts, begins, cut.length)


def _cut_documents(
    starts: NDArray[np.int64], counts: NDArray[np.int64], begins: NDArray[np.int64], length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and ends of the pieces of documents whose `counts` positions lie in a line from `begins` on.

    The line is cut at every multiple of `length`. All int64 [documents].
    """
    rows = begins // length
    pieces = (begins + counts - 1) // length - rows + 1
    document = np.repeat(np.arange(len(pieces)), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    low = np.maximum(begins[document], (rows[document] + number) * length)
    high = np.minimum((begins + counts)[document], (rows[document] + number + 1) * length)
    shift = starts[document] - begins[document]
    return low + shift, high + shift + 1
