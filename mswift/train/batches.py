"""From a position in the data to the microbatches of one rank. The position of a run is `consumed_samples`.

Which samples form a step depends on (seed, consumed_samples, global_batch_size) alone; a layout only decides
who computes which of them. With packing, packs are counted in place of samples. B: microbatch size, S: row length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from mswift.data.batch import collate_packs
from mswift.data.dataset import TokenDataset
from mswift.data.order import sample_ids
from mswift.data.packed import Dataset, PackedDataset, Stored, Window, is_packed, squared_lengths
from mswift.data.stream import StreamDataset
from mswift.parallel.batch import Microbatch


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of one rank."""

    micro_batch_size: int
    global_batch_size: int
    dp_rank: int
    dp_size: int
    seq_multiple: int
    pad_token_id: int
    document_multiple: int = 1
    """What each packed sample is padded to a multiple of where a rank lays a microbatch out."""
    microbatch_multiple: int = 1
    """The same for all the rows of a packed microbatch together; it divides `seq_multiple`."""
    one_length: bool = False
    """All microbatches of a step are as long as the longest: what passes between pipeline stages has one shape. Else
    samples of like length share a microbatch, which is as long as its longest."""
    per_sample: bool = False
    """The weights of each sample sum up to 1 (--loss_normalization sample)."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of a step, with the counts of the whole global batch."""

    microbatches: list[Microbatch]
    sample_ids: list[int]
    """Of packs, where samples are packed."""
    tokens: int
    squared_lengths: int
    """Sum over all samples of the square of their positions."""
    padding_tokens: int
    """Positions that are computed for nothing, by all data-parallel ranks."""


def training_batch(data: Stored | StreamDataset, plan: BatchPlan, seed: int, consumed_samples: int) -> StepBatch:
    """The batch that follows `consumed_samples` samples of the endless shuffled order (of a stream: of its own)."""
    if isinstance(data, StreamDataset):
        window = data.window(consumed_samples, plan.global_batch_size)
        return replace(assemble(window, plan, range(plan.global_batch_size)), sample_ids=window.numbers)
    ids = sample_ids(len(data), seed, consumed_samples, plan.global_batch_size)
    return assemble(data, plan, [int(i) for i in ids])


def evaluation_batches(data: Stored, plan: BatchPlan) -> list[list[int]]:
    """The whole data set in its own order, in global batches; the last is filled up with -1 (a row of padding)."""
    size = plan.global_batch_size
    ids = list(range(len(data)))
    ids += [-1] * (-len(ids) % size)
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def assemble(data: Dataset, plan: BatchPlan, ids: Sequence[int]) -> StepBatch:
    """Microbatches of this data-parallel rank out of the global batch `ids`.

    Their lengths follow from the rows of all ranks, so every rank computes the same ones without asking.
    """
    real = [i for i in ids if i >= 0]
    by_place = np.array([data.lengths[i] if i >= 0 else 0 for i in ids])  # the last token of a sample is only a target
    if isinstance(data, TokenDataset) or not is_packed(data):
        slots = _slots(by_place, plan)
        rows = slots[:, plan.dp_rank].tolist()
        lengths = _padded(by_place[slots].max(axis=(1, 2), initial=1), plan)
        positions = int(lengths.sum()) * plan.micro_batch_size * plan.dp_size
    else:
        rows = dealt(ids, data.squares, plan)
        lengths = np.repeat(_padded(by_place.max(initial=1), plan), len(rows))
        positions = _packed_positions(data, ids, int(lengths[0]), plan)
    microbatches = [
        _microbatch(data, ids, places, int(length), plan) for places, length in zip(rows, lengths, strict=True)
    ]
    tokens = int(by_place.sum())
    squares = int(squared_lengths(data, real).sum())
    return StepBatch(microbatches, list(ids), tokens, squares, positions - tokens)


def _slots(lengths: NDArray[np.int64], plan: BatchPlan) -> NDArray[np.int64]:
    """Places in the global batch by [microbatch, data-parallel rank, row]: in order, or those of like length together.

    lengths: by place.
    """
    shape = (-1, plan.dp_size, plan.micro_batch_size)
    if plan.one_length:
        return np.arange(len(lengths)).reshape(shape)
    slots = np.argsort(-lengths, kind="stable").reshape(shape)
    return np.sort(slots, axis=2)


def _padded(longest: NDArray[np.int64], plan: BatchPlan) -> NDArray[np.int64]:
    """Positions of microbatches by their longest rows."""
    lengths = _up(longest, plan.seq_multiple)
    return np.broadcast_to(lengths.max(), lengths.shape) if plan.one_length else lengths


def dealt(ids: Sequence[int], costs: NDArray[np.int64], plan: BatchPlan) -> list[list[int]]:
    """Places in `ids` of the packs of each microbatch of this rank; ranks have equally much to compute in each.

    Dealt to and fro from the dearest on: packs to microbatches of the global batch, then those to ranks. `costs` by id.
    """
    hands, dearest = _hands(ids, costs, plan)
    return [hands[:, slot].tolist() for slot in dearest[:, plan.dp_rank]]


def _hands(
    ids: Sequence[int], costs: NDArray[np.int64], plan: BatchPlan
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places in `ids` by microbatch of the global batch [B, slots], and slots by [microbatch of a rank, rank]."""
    slots = len(ids) // plan.micro_batch_size
    price = np.array([costs[i] if i >= 0 else 0 for i in ids])
    hands = _to_and_fro(np.argsort(-price, kind="stable").reshape(plan.micro_batch_size, slots))
    dearest = np.argsort(-price[hands].sum(axis=0), kind="stable").reshape(-1, plan.dp_size)
    return hands, _to_and_fro(dearest)


def _packed_positions(data: PackedDataset | Window, ids: Sequence[int], seq_length: int, plan: BatchPlan) -> int:
    """Positions that all data-parallel ranks compute in a step.

    As mswift.parallel.batch.rank_batches pads: every sample and the rest of every row to the multiple of documents,
    every microbatch to that of microbatches, and, if they have one length, those of a rank to its longest.
    """
    rows = np.array([_padded_row(data, i, seq_length, plan.document_multiple) for i in ids])
    hands, dearest = _hands(ids, data.squares, plan)
    lengths = _up(rows[hands].sum(axis=0), plan.microbatch_multiple)[dearest]  # [microbatches of a rank, ranks]
    return int(lengths.max(axis=0).sum()) * len(dearest) if plan.one_length else int(lengths.sum())


def _padded_row(data: PackedDataset | Window, index: int, seq_length: int, multiple: int) -> int:
    lengths = data.sample_lengths(index) if index >= 0 else np.zeros(0, dtype=np.int64)
    return int(_up(np.append(lengths, seq_length - lengths.sum()), multiple).sum())


def _up(values: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    """To the next multiple."""
    return -(-values // multiple) * multiple


def _to_and_fro(rounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every second round in the other direction."""
    rounds = rounds.copy()
    rounds[1::2] = rounds[1::2, ::-1]
    return rounds


def _microbatch(
    data: Dataset, ids: Sequence[int], places: Sequence[int], seq_length: int, plan: BatchPlan
) -> Microbatch:
    """Rows of samples or packs at these places of `ids`; id -1 is a row of padding without loss. Tensors [B, S]."""
    rows = [list(data.row(ids[place]).values()) if ids[place] >= 0 else [] for place in places]
    if plan.per_sample:
        rows = [[sample.counting_one() for sample in row] for row in rows]
    names = data.channel_names
    batch, documents = collate_packs(rows, seq_length, plan.pad_token_id, names)
    tokens, labels, weights, channels = (torch.from_numpy(array) for array in batch)
    apart, packed = channels if names else None, is_packed(data)
    lengths = None if packed else tuple(sum(len(sample.tokens) - 1 for sample in row) for row in rows)
    return Microbatch(tokens, labels, weights, documents if packed else None, apart, tuple(places), lengths)
