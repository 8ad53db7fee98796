"""What is in an entry of the token cache, for people: rows, tokens, lengths, loss weights, why rows are not used."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mswift.data.cache import TokenStore
from mswift.data.report import FileReport

_BAR = 40
_CHUNK_TOKENS = 1 << 24


def describe(store: TokenStore) -> Iterator[str]:
    """Lines."""
    reports = [FileReport.load(report) for report in store.report["files"]]
    lengths = np.diff(store.offsets)
    what = "documents" if store.mask is None else "samples"
    num_tokens = len(store.tokens)
    yield f"rows         {sum(report.rows for report in reports):,} in {len(reports):,} files"
    yield f"{what:<13}{len(lengths):,}"
    yield f"tokens       {num_tokens:,}, the largest id {store.largest_token:,}"
    counts = _weight_counts(store)
    learned = num_tokens if counts is None else int(counts[1:].sum())
    yield f"learned      {learned:,} ({learned / num_tokens:.1%})"
    if counts is not None and len(store.weights) > 2:
        shares = [
            f"{weight:g}: {count:,}" for weight, count in zip(store.weights[1:], counts[1:], strict=True) if count
        ]
        yield f"weights      {', '.join(shares)} tokens"
    yield f"fingerprint  {store.fingerprint[:16]}"
    for report in reports:
        yield f"  {report.line()}"
        yield from (f"    rejected: {reason}" for reason in report.reasons)
    yield f"tokens in a {what[:-1]}: {_quantiles(lengths)}"
    yield from _histogram(lengths)


def _weight_counts(store: TokenStore) -> NDArray[np.int64] | None:
    """Tokens of each loss weight, int64 [weights]."""
    if store.mask is None:
        return None
    counts = np.zeros(len(store.weights), dtype=np.int64)
    for start in range(0, len(store.mask), _CHUNK_TOKENS):
        counts += np.bincount(store.mask[start : start + _CHUNK_TOKENS], minlength=len(counts))
    return counts


def _quantiles(lengths: NDArray[np.int64]) -> str:
    least, half, most = (int(value) for value in np.quantile(lengths, (0, 0.5, 1), method="lower"))
    return f"{least:,} to {most:,}, median {half:,}, mean {lengths.mean():,.1f}"


def _histogram(lengths: NDArray[np.int64]) -> Iterator[str]:
    """A bar for each doubling of the length: [1, 2), [2, 4), ..."""
    doublings = np.bincount(np.frexp(lengths.astype(np.float64))[1])
    first, last = (int(place) for place in np.flatnonzero(doublings)[[0, -1]])
    for place in range(first, last + 1):
        low, high = (1 << place) >> 1, (1 << place) - 1
        bar = "#" * round(_BAR * doublings[place] / doublings.max())
        yield f"  {f'{low:,} - {high:,}':>21} {doublings[place]:>12,} {bar}".rstrip()
