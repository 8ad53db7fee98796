"""Packing changes how rows are laid out and nothing else: loss and gradients are those of each sample by itself.

fp32; at most 1e-5 from transformers and 5e-6 from one unpacked Megatron rank (max|a - b| / max|b| per tensor).
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import lcm
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.data.dataset import DataOptions, build_dataset
from mswift.data.packed import Dataset, PackedDataset
from mswift.parallel.batch import document_multiple, rank_batches, sequence_multiple
from mswift.topology import ParallelDims
from mswift.train.batches import BatchPlan, StepBatch, assemble, dealt, evaluation_batches, training_batch
from tests.support.parity import Batch, differences, megatron_run, random_model, reference
from tests.support.spaces import weights_of
from tests.support.tiny import tiny_tokenizer

SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}
WHAT = ("loss", "grad_norm", "gradients", "weights")
CAPACITY = 160
MODEL = "qwen3"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "cp2": (2, {"cp": 2}),
    "pp2": (2, {"pp": 2}),
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """30 conversations of uneven length, one with weights of its own."""
    home = tmp_path_factory.mktemp("packed")
    rows: list[Any] = [{"query": f"say {i}", "response": "x" * (1 + i * 7 % 23) + str(i)} for i in range(29)]
    turns = [{"role": "user", "content": "hm"}, {"role": "assistant", "content": "well", "loss_scale": 0.25}]
    rows.append({"messages": [*turns, {"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]})
    (home / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = DataOptions(max_length=64, cache_dir=home / "cache")
    return build_dataset("sft", [str(home / "chat.jsonl")], tiny_tokenizer(home), options, is_writer=True,
                         barrier=lambda: None, progress=False)  # fmt: skip


def plan(dp_size: int = 1, micro_batch_size: int = 1, dp_rank: int = 0, global_batch_size: int = 8) -> BatchPlan:
    return BatchPlan(
        micro_batch_size, global_batch_size, dp_rank, dp_size, seq_multiple=8, pad_token_id=0, one_length=True
    )


def whole_set(data: Dataset, dp_size: int = 1, micro_batch_size: int = 1) -> list[StepBatch]:
    """The data set as one global batch, by rank."""
    unit = dp_size * micro_batch_size
    size = -(-len(data) // unit) * unit
    plans = [plan(dp_size, micro_batch_size, rank, size) for rank in range(dp_size)]
    (ids,) = evaluation_batches(data, plans[0])
    return [assemble(data, each, ids) for each in plans]


def as_steps(ranks: Sequence[StepBatch]) -> Any:
    """One step for `megatron_run`: microbatch m of rank d of n at place m * n + d."""
    together = zip(*(rank.microbatches for rank in ranks), strict=True)
    return [[(b.tokens, b.labels, b.loss_weights, b.documents) for batches in together for b in batches]]


@cache
def start() -> tuple[dict[str, Any], Any]:
    model = random_model(MODEL)
    return {k: v for k, v in model.config.to_dict().items() if v is not None}, {
        name: weight.copy() for name, weight in weights_of(model).items()
    }


def run(data: Dataset, layout: str, micro_batch_size: int = 1, **settings: Any) -> dict[str, Any]:
    """One step over the whole data set."""
    world_size, degrees = LAYOUTS[layout]
    steps = as_steps(whole_set(data, 2 if layout == "dp2" else 1, micro_batch_size))
    return megatron_run(*start(), steps, SGD | settings, world_size, degrees)


@pytest.fixture(scope="module")
def unpacked(samples: Any) -> dict[str, Any]:
    return run(samples, "one", micro_batch_size=5)


CASES = [
    ("one", 1, "bestfit"),
    ("one", 3, "sequential"),
    *((layout, 1, "bestfit") for layout in LAYOUTS if layout != "one"),
]


@pytest.mark.parametrize(("layout", "micro_batch_size", "strategy"), CASES)
def test_packed_equals_unpacked(
    samples: Any, unpacked: dict[str, Any], layout: str, micro_batch_size: int, strategy: Any
) -> None:
    packs = PackedDataset(samples, CAPACITY, strategy)
    assert 4 < len(packs) < len(samples) / 2
    found = run(packs, layout, micro_batch_size)
    assert {name: d for name, d in differences(found, unpacked, WHAT).items() if not d <= 5e-6} == {}
    assert found["evaluated"] == pytest.approx(unpacked["evaluated"], rel=1e-6)


def test_recomputed_and_fused_packs_equal_unpacked_samples(samples: Any, unpacked: dict[str, Any]) -> None:
    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    found = run(PackedDataset(samples, CAPACITY, "bestfit"), "cp2", 2, **again, loss_fusion="true")
    assert {name: d for name, d in differences(found, unpacked, WHAT).items() if not d <= 5e-6} == {}


def test_packed_equals_transformers_on_each_sample_by_itself(samples: Any) -> None:
    import torch

    alone: list[Batch] = []
    for number in range(len(samples)):
        sample = samples.sample(number)
        tokens = torch.from_numpy(sample.tokens).long()[None]
        alone.append((tokens[:, :-1], tokens[:, 1:], torch.from_numpy(sample.loss_weights)[None, 1:]))
    truth = reference(random_model(MODEL), [alone], SGD)
    found = run(PackedDataset(samples, CAPACITY, "bestfit"), "one", 2)
    assert {name: d for name, d in differences(found, truth, WHAT).items() if not d <= 1e-5} == {}


def test_samples_that_see_each_other_are_seen(samples: Any, unpacked: dict[str, Any]) -> None:
    """The partner of the tests above: rows as they are packed, but without their documents."""
    steps = as_steps(whole_set(PackedDataset(samples, CAPACITY, "bestfit")))
    joined = [[batch[:3] for batch in step] for step in steps]
    found = megatron_run(*start(), joined, SGD, 1, {})
    assert max(differences(found, unpacked, ("gradients",)).values()) > 1e-3


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """14 documents as `pt` has them, some longer than a row, by how they are cut."""
    home = tmp_path_factory.mktemp("texts")
    rows = [{"text": "".join(chr(97 + (i * j) % 26) for j in range(3 + i * 37 % 90))} for i in range(14)]
    (home / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny_tokenizer(home)

    def built(cut: Any, length: int = 48) -> Any:
        options = DataOptions(max_length=length, cache_dir=home / "cache", cut=cut)
        return build_dataset("pt", [str(home / "texts.jsonl")], tokenizer, options, is_writer=True,
                             barrier=lambda: None, progress=False)  # fmt: skip

    return built


PACKED_TEXTS: list[tuple[str, str, Any]] = [
    ("pp2", "documents", "bestfit"), ("cp2", "documents", "sequential"),
    ("pp2", "rows", "concat-and-split"), ("cp2", "rows", "concat-and-split"),
]  # fmt: skip


@pytest.fixture(scope="module")
def texts_alone(texts: Any) -> dict[str, Any]:
    """What transformers computes of each sample by itself, by how documents are cut."""
    import torch

    found = {}
    for cut in ("documents", "rows"):
        data, alone = texts(cut), []
        for tokens in (torch.from_numpy(data.sample(n).tokens).long()[None] for n in range(len(data))):
            alone.append((tokens[:, :-1], tokens[:, 1:], torch.ones(1, tokens.shape[1] - 1)))
        found[cut] = reference(random_model(MODEL), [alone], SGD)
    return found


@pytest.mark.parametrize(("layout", "cut", "strategy"), PACKED_TEXTS)
def test_packed_documents_equal_transformers_on_each_by_itself(
    texts: Any, texts_alone: dict[str, Any], layout: str, cut: str, strategy: Any
) -> None:
    packs = PackedDataset(texts(cut), 48, strategy)
    assert strategy != "concat-and-split" or set(packs.lengths[:-1].tolist()) == {48}
    found = run(packs, layout)
    assert {name: d for name, d in differences(found, texts_alone[cut], WHAT).items() if not d <= 1e-5} == {}


@pytest.mark.parametrize("layout", ["pp2", "cp2"])
def test_another_document_moves_no_gradient(texts: Any, layout: str) -> None:
    """Bit for bit; with it in the loss, or with documents that see each other, the gradients move."""
    packs, joined = PackedDataset(texts("rows"), 48, "concat-and-split"), texts("joined")

    def moved(data: Dataset, weight: float) -> float:
        found = []
        for token in (20, 60):
            (rank,) = whole_set(data)
            number = next(n for n, b in enumerate(rank.microbatches) if len(b.documents or (1, 1, 1)) > 2)
            batch = rank.microbatches[number]
            documents = batch.documents or (16, 16, 16)
            place = slice(documents[0], sum(documents[:2]))
            batch.loss_weights.view(-1)[place] = weight
            batch.tokens.view(-1)[place] = token
            found.append(megatron_run(*start(), as_steps([rank]), SGD, *LAYOUTS[layout]))
        return max(differences(*found, ("gradients",)).values())

    assert moved(packs, 0.0) == 0.0
    assert moved(packs, 1.0) > 1e-3
    assert moved(joined, 0.0) > 1e-3


def read_back(ranks: Sequence[StepBatch]) -> list[tuple[list[int], list[int], list[float]]]:
    """(tokens, labels, weights) of every document of a step in which something is learned."""
    found = []
    for rank in ranks:
        for batch in rank.microbatches:
            tensors = (batch.tokens, batch.labels, batch.loss_weights)
            parts = zip(*(x.flatten().split(batch.documents) for x in tensors), strict=True)
            found += [tuple(x.tolist() for x in part) for part in parts if part[2].any()]
    return sorted(found)


@pytest.mark.parametrize("one_length", [False, True])
@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 1), (1, 4), (2, 2), (4, 2)])
def test_samples_of_like_length_share_a_microbatch(
    samples: Any, dp_size: int, micro_batch_size: int, one_length: bool
) -> None:
    """Every sample of a step once, at the place that it says; as long as the longest of all ranks; padding counted."""
    size = 4 * dp_size * micro_batch_size
    plans = [replace(plan(dp_size, micro_batch_size, rank, size), one_length=one_length) for rank in range(dp_size)]
    ranks = [training_batch(samples, each, 1, 3) for each in plans]
    ids = ranks[0].sample_ids
    lengths = [samples.lengths[i] for i in ids]
    seen, positions, wanted = [], 0, sorted(lengths, reverse=True)
    for number, parts in enumerate(zip(*(rank.microbatches for rank in ranks), strict=True)):
        longest = wanted[0 if one_length else number * dp_size * micro_batch_size]
        for batch in parts:
            assert batch.documents is None
            assert batch.tokens.shape == (micro_batch_size, -(-longest // 8) * 8)
            positions += batch.tokens.numel()
            for row, place in enumerate(batch.rows):
                seen.append(place)
                tokens = samples.sample(ids[place]).tokens
                assert batch.tokens[row, : len(tokens) - 1].tolist() == tokens[:-1].tolist()
    assert sorted(seen) == list(range(size))
    assert {(rank.tokens, rank.tokens + rank.padding_tokens) for rank in ranks} == {(sum(lengths), positions)}
    if one_length:
        assert seen == sorted(seen) or dp_size > 1


@pytest.mark.parametrize("strategy", ["bestfit", "sequential"])
@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 1), (2, 1), (2, 3), (4, 2)])
def test_every_sample_lies_in_one_row_as_it_is(
    samples: Any, strategy: Any, dp_size: int, micro_batch_size: int
) -> None:
    packs = PackedDataset(samples, CAPACITY, strategy)
    expected = []
    for sample in map(samples.sample, range(len(samples))):
        expected.append((sample.tokens[:-1].tolist(), sample.tokens[1:].tolist(), sample.loss_weights[1:].tolist()))
    ranks = whole_set(packs, dp_size, micro_batch_size)
    assert read_back(ranks) == sorted(expected)
    assert {rank.tokens for rank in ranks} == {int(samples.lengths.sum())}
    assert {rank.squared_lengths for rank in ranks} == {int((samples.lengths**2).sum())}
    positions = sum(batch.tokens.numel() for rank in ranks for batch in rank.microbatches)
    assert {rank.tokens + rank.padding_tokens for rank in ranks} == {positions}


@pytest.mark.parametrize("degrees", [{"cp": 2}, {"cp": 4}, {"cp": 2, "tp": 2, "sequence_parallel": True}, {"tp": 2}])
@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 1), (2, 1), (2, 3)])
def test_padding_is_counted_as_ranks_pad(
    samples: Any, degrees: dict[str, Any], dp_size: int, micro_batch_size: int
) -> None:
    """Every position that a context-parallel rank gets, over all ranks."""
    packs = PackedDataset(samples, CAPACITY, "bestfit")
    model_ranks = degrees.get("cp", 1) * degrees.get("tp", 1)
    dims = ParallelDims(world_size=dp_size * model_ranks, **degrees)
    size = 2 * dp_size * micro_batch_size
    for consumed in (0, size):
        ranks = []
        for dp_rank in range(dp_size):
            each = replace(
                plan(dp_size, micro_batch_size, dp_rank, size),
                seq_multiple=lcm(8, sequence_multiple(dims)),
                document_multiple=document_multiple(dims),
                microbatch_multiple=sequence_multiple(dims),
                one_length=False,
            )
            ranks.append(training_batch(packs, each, 1, consumed))
        positions = 0
        for rank in ranks:
            for cp_rank in range(dims.cp):
                positions += sum(part.tokens.numel() for part in rank_batches(rank.microbatches, dims, cp_rank))
        assert {rank.tokens + rank.padding_tokens for rank in ranks} == {positions}


def test_a_step_has_the_same_packs_at_every_layout(samples: Any) -> None:
    packs = PackedDataset(samples, CAPACITY, "bestfit")
    for consumed in (0, 8, 24):
        steps = [
            [training_batch(packs, plan(dp_size, size, rank), 1, consumed) for rank in range(dp_size)]
            for dp_size, size in ((1, 1), (2, 1), (2, 4), (4, 2))
        ]
        assert len({tuple(rank.sample_ids) for ranks in steps for rank in ranks}) == 1
        assert all(read_back(ranks) == read_back(steps[0]) for ranks in steps)


@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(1, 10**6), min_size=64, max_size=64)
)
def test_ranks_have_equally_much_to_attend_to(
    dp_size: int, micro_batch_size: int, num_microbatches: int, costs: list[int]
) -> None:
    """Every pack once; whole shares differ by no more than one microbatch does from another."""
    size = dp_size * micro_batch_size * num_microbatches
    ids = list(range(size))[::-1]
    ranks = [dealt(ids, np.array(costs), plan(dp_size, micro_batch_size, rank, size)) for rank in range(dp_size)]
    ranks = [[[ids[place] for place in batch] for batch in rank] for rank in ranks]
    assert sorted(i for rank in ranks for batch in rank for i in batch) == sorted(ids)
    assert {(len(rank), *map(len, rank)) for rank in ranks} == {
        (num_microbatches, *[micro_batch_size] * num_microbatches)
    }
    prices = [[sum(costs[i] for i in batch) for batch in rank] for rank in ranks]
    totals, single = [sum(rank) for rank in prices], [price for rank in prices for price in rank]
    assert max(totals) - min(totals) <= max(single) - min(single)
    for one, two in zip(zip(*prices, strict=True), list(zip(*prices, strict=True))[1:], strict=False):
        assert min(one) >= max(two)  # microbatch by microbatch, ranks have what is next in price
