"""Which rows are used: seeded draws, the validation split and mixtures, as properties and pinned numbers."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.data.selection import Selection, chosen_rows, mixture, selected_parts
from mswift.data.sources import parse_source

SIZES = st.integers(1, 300)
SEEDS = st.integers(0, 2**64)
DRAWN, DRAWN_AGAIN = [204, 441, 462, 821, 906], [56, 236, 427, 516, 814]


@given(SIZES, st.integers(1, 1000), SEEDS, st.integers(0, 5))
def test_without_replacement_each_row_comes_as_often_as_any_other(size, count, seed, index):
    rows = chosen_rows(size, count, index, Selection("without_replacement", seed))
    times = np.bincount(rows, minlength=size)
    assert len(rows) == count
    assert set(times) <= {count // size, count // size + 1}
    assert rows.tolist() == sorted(rows.tolist())
    assert rows.tolist() == chosen_rows(size, count, index, Selection("without_replacement", seed)).tolist()


@given(SIZES, st.integers(1, 1000), SEEDS)
def test_with_replacement_rows_are_in_range(size, count, seed):
    rows = chosen_rows(size, count, 0, Selection("with_replacement", seed))
    assert len(rows) == count
    assert 0 <= rows.min() <= rows.max() < size


def test_with_replacement_draws_each_row_alike():
    times = np.bincount(chosen_rows(10, 100_000, 0, Selection("with_replacement", 1)), minlength=10)
    assert np.abs(times - 10_000).max() < 500  # 5 standard deviations


def test_draws_are_fixed_for_ever_and_differ_by_seed_and_source():
    assert chosen_rows(1000, 5, 0, Selection("without_replacement", 42)).tolist() == DRAWN
    assert chosen_rows(1000, 5, 0, Selection("with_replacement", 42)).tolist() == DRAWN_AGAIN
    other = [chosen_rows(1000, 5, 1, Selection("without_replacement", 42)).tolist()]
    other += [chosen_rows(1000, 5, 0, Selection("without_replacement", 43)).tolist(), DRAWN]
    assert len({tuple(rows) for rows in other}) == 3


@given(SIZES, st.none() | st.integers(1, 700), st.floats(0.01, 0.99), SEEDS)
def test_the_split_shares_no_row(size, count, ratio, seed):
    parts = [
        chosen_rows(size, count, 0, Selection("without_replacement", seed, ratio, part))
        for part in ("train", "validation")
    ]
    whole = chosen_rows(size, count, 0, Selection("without_replacement", seed))
    train, validation = parts
    assert not set(train.tolist()) & set(validation.tolist())
    assert set(train.tolist()) | set(validation.tolist()) == set(whole.tolist())
    assert len(validation) == round(len(np.unique(whole)) * ratio)


@given(st.lists(st.tuples(SIZES, st.floats(0.01, 10)), min_size=1, max_size=6), SEEDS)
def test_a_mixture_has_the_shares_of_its_weights(sources, seed):
    sizes, weights = zip(*sources, strict=True)
    rows = mixture(sizes, weights, seed)
    total = sum(sizes)
    assert sum(map(len, rows)) == total
    for size, weight, chosen in zip(sizes, weights, rows, strict=True):
        assert abs(len(chosen) - total * weight / sum(weights)) < 1 + 1e-6
        times = np.bincount(chosen, minlength=size)
        assert times.max() - times.min() <= 1


@pytest.fixture
def folder(tmp_path):
    for name, numbers in (("a.jsonl", range(4)), ("b.jsonl", ()), ("c.jsonl", range(4, 10))):
        (tmp_path / name).write_text("".join(json.dumps({"n": n}) + "\n" for n in numbers))
    return tmp_path


@pytest.mark.parametrize("count", ["", "#3", "#10", "#23"])
@pytest.mark.parametrize("method", ["without_replacement", "with_replacement", "first"])
def test_a_draw_goes_over_the_files_of_a_source(folder, count, method):
    selection = Selection(method, 7)
    source = parse_source(f"{folder}{count}")
    numbers = [r.row["n"] for _, _, found in selected_parts(source, 2, selection) for r in found]
    assert numbers == (chosen_rows(10, source.count, 2, selection).tolist() if count else list(range(10)))
