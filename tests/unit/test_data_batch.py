"""Micro batches: shifted labels, and padding that is never a target."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.data.batch import Sample, collate

PAD = 999


def _sample(tokens, mask):
    return Sample(np.array(tokens, np.int32), np.array(mask, np.float32))


def test_labels_are_the_next_tokens():
    batch = collate([_sample([5, 6, 7, 8], [0, 0, 0.25, 1]), _sample([1, 2], [0, 3])], 4, PAD)
    assert batch.tokens.tolist() == [[5, 6, 7, PAD], [1, PAD, PAD, PAD]]
    assert batch.labels.tolist() == [[6, 7, 8, PAD], [2, PAD, PAD, PAD]]
    assert batch.loss_weights.tolist() == [[0, 0.25, 1, 0], [3, 0, 0, 0]]
    assert [array.dtype for array in batch] == [np.int64, np.int64, np.float32, np.uint8]


SAMPLES = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=2, max_size=9), min_size=1, max_size=4
)


@given(SAMPLES, st.integers(0, 5))
def test_the_weights_select_exactly_the_learned_tokens(rows, extra):
    samples = [_sample([t for t, _ in row], [False, *(m for _, m in row[1:])]) for row in rows]
    batch = collate(samples, max(len(s.tokens) for s in samples) - 1 + extra, PAD)
    for b, sample in enumerate(samples):
        learned = batch.labels[b][batch.loss_weights[b] > 0]
        assert learned.tolist() == sample.tokens[sample.loss_weights > 0].tolist()
        before = batch.tokens[b][batch.loss_weights[b] > 0]
        assert before.tolist() == sample.tokens[np.flatnonzero(sample.loss_weights) - 1].tolist()


def test_a_sample_that_does_not_fit_is_a_bug_of_the_caller():
    with pytest.raises(ValueError, match="3 positions in rows of 2"):
        collate([_sample([1, 2, 3, 4], [0, 1, 1, 1])], 2, PAD)


def test_channels_of_samples():
    rows = [replace(_sample([5, 6, 7], [0, 1, 1]), channel=name) for name in ("b", "", "a")]
    batch = collate(rows, 3, PAD, ("", "a", "b"))
    assert batch.channels.tolist() == [[2, 2, 0], [0, 0, 0], [1, 1, 0]]


def test_a_sample_counts_one():
    sample = _sample([5, 6, 7, 8], [0, 0.5, 0, 1.5]).counting_one()
    assert sample.loss_weights.tolist() == [0, 0.25, 0, 0.75]
    assert sample.loss_weights.dtype == np.float32
