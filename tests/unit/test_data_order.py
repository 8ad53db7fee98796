"""The order of the samples: pure, splittable, a permutation in every epoch, and the same for every number of ranks."""

import math
import time
import tracemalloc
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mswift.data.order import sample_ids

SEEDS = st.integers(0, 2**64 - 1)


@given(st.integers(1, 40), SEEDS, st.integers(0, 200), st.lists(st.integers(0, 12), max_size=4))
def test_any_split_of_a_range_gives_the_same_ids(num_samples, seed, start, pieces):
    whole = sample_ids(num_samples, seed, start, sum(pieces))
    position, parts = start, []
    for count in pieces:
        parts += list(sample_ids(num_samples, seed, position, count))
        position += count
    assert parts == list(whole)


@given(st.integers(1, 300), SEEDS, st.integers(0, 10**9))
@example(1, 0, 0)
@example(2**12, 3, 5)
@example(2**12 + 1, 3, 5)
def test_every_epoch_holds_every_sample_once(num_samples, seed, epoch):
    ids = sample_ids(num_samples, seed, epoch * num_samples, num_samples)
    assert sorted(ids) == list(range(num_samples))


@given(st.integers(5, 60), SEEDS, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_the_ranks_of_a_step_together_see_the_same_samples_at_every_size(num_samples, seed, ranks, step):
    """A resume at another data-parallel size takes the position alone: (steps done) x (global batch)."""
    batch = 8
    seen = [sample_ids(num_samples, seed, step * batch + r * batch // ranks, batch // ranks) for r in range(ranks)]
    assert list(np.concatenate(seen)) == list(sample_ids(num_samples, seed, step * batch, batch))


def test_the_order_is_the_same_for_ever():
    """Written down once: a run started today is resumed by a later version of numpy in the same order.

    Another order takes another ORDER_VERSION, by which older runs are refused.
    """
    assert list(sample_ids(10, 42, 0, 20)) == [4, 1, 6, 3, 0, 9, 8, 2, 5, 7, 9, 3, 7, 0, 4, 2, 5, 8, 1, 6]
    late = [34901593, 7514947, 2733776, 11500639, 33116287, 15400912]
    assert list(sample_ids(50_000_000, 42, 50_000_000 - 3, 6)) == late


@pytest.mark.parametrize("several", ["seeds", "epochs"])
def test_every_permutation_is_as_likely(several):
    """Chi-square over the 24 orders of 4 samples, 30 expected of each; 60 is 5.5 standard deviations away."""
    draws = [sample_ids(4, n, 0, 4) if several == "seeds" else sample_ids(4, 7, 4 * n, 4) for n in range(720)]
    counts = Counter(map(tuple, draws))
    assert len(counts) == math.factorial(4)
    assert sum((count - 30) ** 2 / 30 for count in counts.values()) < 60


def test_every_sample_is_as_likely_at_every_position():
    """Chi-square over 30 samples x 30 positions, 10 expected of each pair; 29 x 29 = 841 degrees of freedom."""
    counts = np.zeros((30, 30))
    for seed in range(300):
        counts[np.arange(30), sample_ids(30, seed, 0, 30)] += 1
    assert abs(((counts - 10) ** 2 / 10).sum() - 841) < 5 * math.sqrt(2 * 841)


def test_orders_of_seeds_and_epochs_have_nothing_in_common():
    """Correlations of two random orders of n samples have a standard deviation of 1 / sqrt(n - 1)."""
    n = 2001
    orders = [np.arange(n), *(sample_ids(n, seed, epoch * n, n) for seed in (0, 1, 2**63) for epoch in (0, 1, 2**40))]
    for one, two in combinations(orders, 2):
        assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(n - 1)
        assert abs(np.corrcoef(one[:-1], two[1:])[0, 1]) < 5 / math.sqrt(n - 2)
        assert np.count_nonzero(one == two) < 10
    for order in orders[1:]:  # neighbours are not neighbours any more
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / math.sqrt(n - 2)


def test_a_position_far_in_a_large_data_set_takes_neither_time_nor_memory():
    tracemalloc.start()
    started = time.process_time()
    ids = sample_ids(10**12, 1, 10**12 - 500, 1000)
    assert time.process_time() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert len(set(ids[:500])) == len(set(ids[500:])) == 500
    assert ids.max() < 10**12
    assert ids.max() > 9 * 10**11


def test_a_far_position_needs_no_replay():
    assert list(sample_ids(7, 1, 7 * 10**15 + 3, 2)) == list(sample_ids(7, 1, 7 * 10**15, 7)[3:5])


@pytest.mark.parametrize(("num_samples", "start", "count"), [(0, 0, 1), (3, -1, 1), (3, 0, -1)])
def test_impossible_ranges_are_refused(num_samples, start, count):
    with pytest.raises(ValueError, match="order over|positions"):
        sample_ids(num_samples, 0, start, count)
