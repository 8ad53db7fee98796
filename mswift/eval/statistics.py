"""From the values of samples to a score, its uncertainty, and the difference of two models. Torch-free."""

# Shapes: N samples, W numbers of a sample's value.

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mswift.eval import text

Value = float | list[float] | None
"""Of a sample: a number, numbers that add up (hits and tries, BLEU's counts), or None: the metric does not apply."""
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Metric:
    """How values become a score. ratio: the mean (a number is the hits of one try); bleu: corpus BLEU of the sums."""

    name: str
    kind: Literal["ratio", "bleu"] = "ratio"
    binary: bool = False
    """Values are 0 or 1: Wilson's interval, McNemar's test."""
    higher_is_better: bool = True
    highest: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """A score of `num_samples` samples with its 95 % interval; `method` says whose."""

    value: float
    low: float
    high: float
    num_samples: int
    method: str


@dataclass(frozen=True)
class Difference:
    """Second minus first, on the same samples, with its 95 % interval by paired bootstrap.

    p_value: McNemar's exact test (binary values), two-sided; None for others.
    """

    first: float
    second: float
    low: float
    high: float
    num_samples: int
    p_value: float | None


def estimate(metric: Metric, values: Sequence[Value], seed: int) -> Estimate | None:
    """The score; None where the metric applies to no sample."""
    table = _table(metric, values)
    num_samples = int(np.count_nonzero(table.any(axis=1))) if metric.kind == "ratio" else len(table)
    if num_samples == 0:
        return None
    score = _score(metric, table.sum(axis=0))
    if metric.binary:
        return Estimate(score, *wilson(score, num_samples), num_samples, "Wilson")
    scores = _resampled(metric, table, seed)
    low, high = np.nanquantile(scores, (0.025, 0.975))
    return Estimate(score, float(low), float(high), num_samples, f"bootstrap, {NUM_RESAMPLES} resamples")


def difference(metric: Metric, first: Sequence[Value], second: Sequence[Value], seed: int) -> Difference | None:
    """Two models on the same samples, in the same order; None where the metric applies to none of both."""
    applies = [i for i, pair in enumerate(zip(first, second, strict=True)) if None not in pair]
    if not applies:
        return None
    pair = [[values[i] for i in applies] for values in (first, second)]
    tables = [_table(metric, values) for values in pair]
    before, after = (_score(metric, table.sum(axis=0)) for table in tables)
    changes = _resampled(metric, tables[1], seed) - _resampled(metric, tables[0], seed)  # the same draws
    low, high = np.nanquantile(changes, (0.025, 0.975))
    p_value = mcnemar(pair[0], pair[1]) if metric.binary else None
    return Difference(before, after, float(low), float(high), len(applies), p_value)


def wilson(share: float, num_samples: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval)."""
    z = 1.959963984540054
    middle = (share + z * z / (2 * num_samples)) / (1 + z * z / num_samples)
    spread = z * math.sqrt(share * (1 - share) / num_samples + z * z / (4 * num_samples**2)) / (1 + z * z / num_samples)
    return max(0.0, middle - spread), min(1.0, middle + spread)


def mcnemar(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Two-sided p of the exact test: of the samples on which two models differ, as many for each by chance."""
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(a < b for a, b in zip(first, second, strict=True))
    num_differ, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(num_differ, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**num_differ)


def _table(metric: Metric, values: Sequence[Value]) -> NDArray[np.float64]:
    """[N, W] numbers that add up; zeros where a ratio does not apply."""
    rows = []
    for value in values:
        if value is None:
            rows.append([0.0, 0.0] if metric.kind == "ratio" else [0.0] * text.BLEU_STATS)
        else:
            rows.append(value if isinstance(value, list) else [float(value), 1.0])
    return np.array(rows, dtype=np.float64).reshape(len(values), -1)


def _score(metric: Metric, sums: NDArray[np.float64]) -> float:
    if metric.kind == "bleu":
        return text.bleu(sums.tolist())
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def _resampled(metric: Metric, table: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Scores of NUM_RESAMPLES draws of N samples with replacement; the draws depend on seed and N only."""
    generator = np.random.default_rng(seed)
    scores = np.empty(NUM_RESAMPLES)
    for index in range(NUM_RESAMPLES):
        counts = np.bincount(generator.integers(0, len(table), len(table)), minlength=len(table))
        scores[index] = _score(metric, counts @ table)
    return scores
