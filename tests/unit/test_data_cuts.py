"""How the stream of `pt` becomes samples, against a loop over its positions one by one."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.data.cache import TokenStore
from mswift.data.packing import pack
from mswift.data.samples import Cut, by_source, mixed, whole

DOCUMENTS = st.lists(st.integers(1, 20), min_size=1, max_size=12).filter(lambda lengths: max(lengths) > 1)


def store(lengths, ends=None):
    """Documents of so many tokens, those of source i up to document ends[i]."""
    offsets = np.array([0, *np.cumsum(lengths)], dtype=np.int64)
    tokens = np.arange(offsets[-1], dtype=np.int32)
    report = {"files": [], "source_ends": [(end, int(offsets[end])) for end in ends or [len(lengths)]]}
    return TokenStore(
        tokens, None, np.array([0, 1], np.float32), offsets, None, (), int(offsets[-1]), report, "f", Path(), 0
    )


def one_by_one(lengths, length, kind):
    """(first token, last token) of every sample: position after position, and what ends one."""
    found, first, filled = [], 0, 0
    for count in lengths:
        begin = first
        for token in range(first, first + count - 1):
            filled += 1
            size = token + 1 - begin
            is_full = filled % length == 0 if kind == "rows" else size == length
            if is_full or token == first + count - 2:
                found.append((begin, token + 1))
                begin = token + 1
        first += count
    return found


def pairs(samples):
    return list(zip(samples.starts.tolist(), (samples.ends - 1).tolist(), strict=True))


@pytest.mark.parametrize("kind", ["documents", "rows"])
@given(lengths=DOCUMENTS, length=st.integers(1, 9))
def test_samples_are_those_of_a_loop_over_positions(kind, lengths, length):
    samples = whole(store(lengths), Cut(length, kind))
    assert pairs(samples) == one_by_one(lengths, length, kind)
    assert samples.num_trained_tokens == sum(lengths) - len(lengths)  # every token but the first of a document
    alone = lengths.count(1)
    assert samples.lines == (
        (f"{alone} documents of one token teach nothing by themselves and are left out",) * (alone > 0)
    )


@given(lengths=DOCUMENTS, length=st.integers(1, 9))
def test_documents_cut_where_rows_end_fill_every_row(lengths, length):
    samples = whole(store(lengths), Cut(length, "rows"))
    sizes = samples.ends - samples.starts - 1
    packs = pack(sizes, length, "concat-and-split")
    assert packs.members.tolist() == list(range(len(sizes)))
    assert set(packs.sums(sizes)[:-1].tolist()) <= {length}


@pytest.mark.parametrize("kind", ["documents", "rows"])
@given(lengths=DOCUMENTS.filter(lambda lengths: len(lengths) > 1), length=st.integers(1, 9), data=st.data())
def test_sources_are_cut_on_their_own(kind, lengths, length, data):
    middle = data.draw(st.integers(1, len(lengths) - 1))
    shift = sum(lengths[:middle])
    parts = [one_by_one(part, length, kind) for part in (lengths[:middle], lengths[middle:])]
    expected = parts[0] + [(first + shift, last + shift) for first, last in parts[1]]
    samples = by_source(store(lengths, [middle, len(lengths)]), Cut(length, kind), ["a", "b"])
    assert pairs(samples) == expected
    assert samples.channels.tolist() == [0] * len(parts[0]) + [1] * len(parts[1])
    if all(parts):
        once = mixed(store(lengths, [middle, len(lengths)]), "epochs", (1, 1), 0, Cut(length, kind), "--dataset")
        assert sorted(pairs(once)) == expected


def test_each_way_of_cutting_is_a_data_set_of_its_own():
    kinds = ("joined", "documents", "rows")
    assert len({whole(store([5, 9]), Cut(4, kind)).fingerprint for kind in kinds}) == 3
