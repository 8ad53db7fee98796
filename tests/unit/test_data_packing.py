"""Packs hold every sample once, never more than their capacity, and are those of the textbook algorithms."""

import json
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.data.packing import Packs, pack
from tests.support.shared import shared_file

STRATEGIES = ("bestfit", "sequential", "concat-and-split")
CASES = st.integers(1, 30).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=60))
)


def packed(lengths: list[int], capacity: int, strategy: str) -> Packs:
    return pack(np.array(lengths, dtype=np.int64), capacity, strategy)  # type: ignore[arg-type]


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """One sample after the other, as it is defined: the lengths in each row."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def next_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The same for filling one row after the other."""
    rows: list[list[int]] = []
    for length in lengths:
        if rows and sum(rows[-1]) + length <= capacity:
            rows[-1].append(length)
        else:
            rows.append([length])
    return rows


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=CASES)
def test_every_sample_is_in_one_pack_and_no_pack_is_too_full(strategy, case):
    capacity, lengths = case
    packs = packed(lengths, capacity, strategy)
    assert sorted(packs.members.tolist()) == list(range(len(lengths)))
    rows = [packs[i].tolist() for i in range(len(packs))]
    assert [n for row in rows for n in row] == packs.members.tolist()
    sums = [sum(lengths[n] for n in row) for row in rows]
    assert packs.sums(np.array(lengths, dtype=np.int64)).tolist() == sums
    assert all(0 < total <= capacity for total in sums)


@given(CASES)
def test_best_fit_is_the_textbook_s(case):
    """Which of several rows with as much room gets a sample is open: how full they are is compared, not with what."""
    capacity, lengths = case
    sums = packed(lengths, capacity, "bestfit").sums(np.array(lengths, dtype=np.int64))
    assert sorted(sums.tolist()) == sorted(map(sum, best_fit_decreasing(lengths, capacity)))


@given(CASES)
def test_sequential_is_next_fit(case):
    capacity, lengths = case
    packs = packed(lengths, capacity, "sequential")
    assert [[lengths[n] for n in packs[i]] for i in range(len(packs))] == next_fit(lengths, capacity)
    assert packs.members.tolist() == list(range(len(lengths)))


@given(CASES)
def test_best_fit_is_close_to_the_fewest_rows_there_can_be(case):
    """At most 11/9 of them and 4 more (Johnson et al.); the fewest are bounded by the sum and by what is over half."""
    capacity, lengths = case
    fewest = max(-(-sum(lengths) // capacity), sum(2 * length > capacity for length in lengths))
    packs = packed(lengths, capacity, "bestfit")
    assert fewest <= len(packs)
    assert len(packs) <= 11 / 9 * fewest + 4 or len(packs) <= len(packed(lengths, capacity, "sequential"))


def lengths_of_conversations(number: int, capacity: int) -> np.ndarray:
    """Log-normal, as the lengths of published chat sets are, cut at the capacity."""
    drawn = np.random.default_rng(1).lognormal(6.0, 0.9, number)
    return np.clip(drawn.astype(np.int64), 8, capacity)


def test_rows_of_4096_are_more_than_99_percent_full():
    lengths = lengths_of_conversations(20_000, 4096)
    for strategy, least in (("bestfit", 0.99), ("sequential", 0.85)):
        fill = lengths.sum() / (len(pack(lengths, 4096, strategy)) * 4096)
        assert least < fill <= 1, strategy


def test_published_sets_fill_as_few_rows_as_there_can_be():
    """About 4 bytes a token; samples of more than 4096 are left out, as training does. Together: 99 % full."""
    together = []
    for name in ("alpaca_en_demo", "alpaca_zh_demo", "dpo_en_demo", "glaive_toolcall_en_demo", "kto_en_demo"):
        rows = json.loads(shared_file(f"data/sft/{name}.json").read_text(encoding="utf-8"))
        sizes = np.array([len(json.dumps(list(row.values()), ensure_ascii=False).encode()) // 4 for row in rows])
        lengths = sizes[sizes <= 4096]
        fewest = max(-(-int(lengths.sum()) // 4096), int((2 * lengths > 4096).sum()))
        assert len(pack(lengths, 4096, "bestfit")) == fewest, name
        together.append(lengths)
    lengths = np.concatenate(together)
    assert len(lengths) > 2000
    assert lengths.sum() / (len(pack(lengths, 4096, "bestfit")) * 4096) > 0.99


def test_half_a_million_samples_take_little_time_and_memory():
    lengths = lengths_of_conversations(500_000, 4096)
    for strategy in STRATEGIES:
        tracemalloc.start()
        started = time.process_time()
        pack(lengths, 4096, strategy)
        assert time.process_time() - started < 2
        assert tracemalloc.get_traced_memory()[1] < 100 * len(lengths)  # ten million: 1 GB
        tracemalloc.stop()


def test_a_sample_that_does_not_fit_is_a_bug_of_the_caller():
    for lengths in ([3, 5], [0, 3]):
        with pytest.raises(ValueError, match="positions in packs of 4"):
            packed(lengths, 4, "bestfit")
    assert len(packed([], 4, "bestfit")) == len(packed([], 4, "sequential")) == 0
