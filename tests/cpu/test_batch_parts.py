"""What each context-parallel rank gets of a microbatch: every token once, padding without loss, at any layout."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mswift.data.batch import Sample
from mswift.errors import LayoutError
from mswift.parallel.attention.share import Share, natural_rows
from mswift.parallel.batch import Microbatch, rank_batches, sequence_multiple, whole_rows
from mswift.parallel.dropout import at, noise, places
from mswift.topology import ParallelDims
from mswift.train.batches import BatchPlan, assemble

CPU = torch.device("cpu")


def layout(cp: int, tp: int) -> ParallelDims:
    return ParallelDims(cp * tp, cp=cp, tp=tp, sequence_parallel=tp > 1)


def microbatch(rows: int, length: int, documents: tuple[int, ...] | None = None) -> Microbatch:
    """Tokens 1, 2, 3, ...; every one with loss."""
    tokens = torch.arange(1, rows * length + 1).view(rows, length)
    return Microbatch(tokens, tokens + 1, torch.ones(rows, length), documents)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20))
def test_rows_are_padded_and_put_together_again(cp: int, tp: int, rows: int, length: int) -> None:
    dims, batch = layout(cp, tp), microbatch(rows, length)
    parts = [rank_batches([batch], dims, rank)[0] for rank in range(cp)]
    assert parts[0].seq_length % sequence_multiple(dims) == 0
    assert parts[0].seq_length - length < sequence_multiple(dims)
    assert torch.equal(whole_rows([part.tokens for part in parts], length), batch.tokens)
    assert sum(float(part.loss_weights.sum()) for part in parts) == rows * length


@given(st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_documents_keep_their_order_and_get_their_own_padding(cp: int, tp: int, lengths: list[int]) -> None:
    dims, batch = layout(cp, tp), microbatch(1, sum(lengths), tuple(lengths))
    longer = microbatch(1, sum(lengths) + 3, (sum(lengths) + 3,))
    parts = [rank_batches([batch, longer], dims, rank) for rank in range(cp)]
    for own in zip(*parts, strict=True):
        assert {part.tokens.shape for part in own} == {(1, own[0].seq_length // cp)}
    documents = parts[0][0].documents
    assert documents is not None
    assert sum(documents) == parts[0][0].seq_length
    everyone = Share(documents, tuple(range(cp)), cp)
    whole, weights = torch.zeros(2, sum(documents))
    whole[natural_rows(everyone, CPU)] = torch.cat([rank[0].tokens[0] for rank in parts]).float()
    weights[natural_rows(everyone, CPU)] = torch.cat([rank[0].loss_weights[0] for rank in parts])
    expected = batch.tokens[0].split(lengths)
    for found, padded_weights, tokens in zip(whole.split(documents), weights.split(documents), expected, strict=False):
        assert found[: len(tokens)].tolist() == tokens.tolist()
        assert not found[len(tokens) :].any()
        assert float(padded_weights.sum()) == len(tokens)
    assert float(weights.sum()) == sum(lengths)


@pytest.mark.parametrize("documents", [None, 1])
def test_stages_pass_on_one_shape_and_a_single_one_none(documents: int | None) -> None:
    each = [microbatch(1, length, documents and (length,)) for length in (4, 9)]
    if documents:
        assert [part.seq_length for part in rank_batches(each, ParallelDims(2, pp=2), 0)] == [9, 9]
    assert [part.seq_length for part in rank_batches(each, ParallelDims(2), 0)] == [4, 9]


def test_what_does_not_fit_together_is_refused() -> None:
    dims = ParallelDims()
    with pytest.raises(LayoutError, match=r"differ in shape over 2 pipeline stages: \(1, 5\) and \(1, 4\)"):
        rank_batches([microbatch(1, 4), microbatch(1, 5)], ParallelDims(2, pp=2), 0)
    with pytest.raises(LayoutError, match="documents of 3 positions in rows of 4"):
        rank_batches([microbatch(1, 4, (3,))], dims, 0)
    with pytest.raises(LayoutError, match="packed and not packed"):
        rank_batches([microbatch(1, 4), microbatch(1, 4, (4,))], dims, 0)


class Samples:
    """Eight samples of uneven length, as a data set that is not packed."""

    channel_names = ()
    lengths = np.array([3, 20, 9, 31, 1, 14, 22, 7])

    def row(self, number: int) -> dict[int, Sample]:
        positions = int(self.lengths[number])
        return {number: Sample(np.arange(positions + 1, dtype=np.int32), np.ones(positions + 1, np.float32))}


def noises(monkeypatch: pytest.MonkeyPatch, micro_batch_size: int, **sizes: Any) -> dict[int, torch.Tensor]:
    """The noise of every sample at a layout, by its place in the global batch."""
    dims, data, found = ParallelDims(**sizes), Samples(), {}
    monkeypatch.setattr("mswift.train.batches.is_packed", lambda _: False)
    monkeypatch.setattr("mswift.train.batches.squared_lengths", lambda *_: np.zeros(1))
    for rank in range(dims.world_size):
        here = dims.coordinate(rank)
        plan = BatchPlan(micro_batch_size, 8, here.dp, dims.dp, 8, 0, one_length=dims.pp > 1)
        microbatches = assemble(data, plan, range(8)).microbatches  # type: ignore[arg-type]
        batches = rank_batches(microbatches, dims, here.cp)
        for batch, part, place in zip(
            microbatches, batches, places(microbatches, batches, dims, here, 5, 2), strict=True
        ):
            with at(place):
                values = noise(torch.zeros(part.tokens.shape[1], part.tokens.shape[0], 4), "embedding", 5.0)
            assert batch.rows is not None
            everyone = torch.arange(part.seq_length) if place.positions is None else place.positions
            for row, own in zip(batch.rows, values.unbind(1), strict=True):
                whole = found.setdefault(row, torch.full((int(data.lengths[row]), 4), torch.nan))
                inside = everyone < len(whole)
                whole[everyone[inside]] = own[inside]
    return found


def test_noise_goes_by_the_positions_of_a_sample_at_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by those of the microbatch that a layout puts it into."""
    one = noises(monkeypatch, 1, world_size=1)
    assert one.keys() == set(range(8))
    for row, values in one.items():
        bound = 5.0 / (int(Samples.lengths[row]) * 4) ** 0.5
        assert values.abs().max() <= bound * 1.0001
    for micro_batch_size, sizes in ((4, {"world_size": 1}), (2, {"world_size": 2}), (1, {"world_size": 2, "pp": 2}),
                                    (2, {"world_size": 2, "cp": 2})):  # fmt: skip
        found = noises(monkeypatch, micro_batch_size, **sizes)
        assert {row: torch.equal(found[row], values) for row, values in one.items()} == dict.fromkeys(one, True)
