"""The order of the samples: pure, splittable, a permutation in every epoch, and the same for every number of ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.data.order import epoch_permutation, sample_ids

SEEDS = st.integers(0, 2**64 - 1)


@given(st.integers(1, 40), SEEDS, st.integers(0, 200), st.lists(st.integers(0, 30), max_size=6))
def test_any_split_of_a_range_gives_the_same_ids(num_samples, seed, start, pieces):
    whole = sample_ids(num_samples, seed, start, sum(pieces))
    position, parts = start, []
    for count in pieces:
        parts += list(sample_ids(num_samples, seed, position, count))
        position += count
    assert parts == list(whole)


@given(st.integers(1, 200), SEEDS, st.integers(0, 10**9))
def test_every_epoch_holds_every_sample_once(num_samples, seed, epoch):
    ids = sample_ids(num_samples, seed, epoch * num_samples, num_samples)
    assert sorted(ids) == list(range(num_samples))


@given(st.integers(5, 60), SEEDS, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_the_ranks_of_a_step_together_see_the_same_samples_at_every_size(num_samples, seed, ranks, step):
    """A resume at another data-parallel size takes the position alone: (steps done) x (global batch)."""
    batch = 8
    seen = [sample_ids(num_samples, seed, step * batch + r * batch // ranks, batch // ranks) for r in range(ranks)]
    assert list(np.concatenate(seen)) == list(sample_ids(num_samples, seed, step * batch, batch))


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_permutation(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_is_the_same_for_ever():
    """Written down once: a run started today is resumed by a later version of numpy in the same order."""
    assert list(sample_ids(10, 42, 0, 20)) == [7, 1, 6, 4, 3, 5, 9, 0, 2, 8, 4, 9, 5, 3, 0, 2, 7, 1, 6, 8]


def test_a_far_position_needs_no_replay():
    assert list(sample_ids(7, 1, 7 * 10**15 + 3, 2)) == list(sample_ids(7, 1, 7 * 10**15, 7)[3:5])


@pytest.mark.parametrize(("num_samples", "start", "count"), [(0, 0, 1), (3, -1, 1), (3, 0, -1)])
def test_impossible_ranges_are_refused(num_samples, start, count):
    with pytest.raises(ValueError, match="order over|positions"):
        sample_ids(num_samples, 0, start, count)
