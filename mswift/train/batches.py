"""From a position in the data to the microbatches of one rank. The position of a run is `consumed_samples`.

Which samples form a step depends on (seed, consumed_samples, global_batch_size) alone; a layout only decides
who computes which of them. B: microbatch size, S: padded sequence length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mswift.data.batch import collate
from mswift.data.dataset import TokenDataset
from mswift.data.order import sample_ids
from mswift.parallel.megatron.engine import Microbatch


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of one rank."""

    micro_batch_size: int
    global_batch_size: int
    dp_rank: int
    dp_size: int
    seq_multiple: int
    pad_token_id: int


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of a step, with the counts of the whole global batch."""

    microbatches: list[Microbatch]
    sample_ids: list[int]
    seq_length: int
    tokens: int
    padding_tokens: int


def training_batch(dataset: TokenDataset, plan: BatchPlan, seed: int, consumed_samples: int) -> StepBatch:
    """The batch that follows `consumed_samples` samples of the endless shuffled order."""
    ids = sample_ids(len(dataset), seed, consumed_samples, plan.global_batch_size)
    return assemble(dataset, plan, [int(i) for i in ids])


def evaluation_batches(dataset: TokenDataset, plan: BatchPlan) -> list[list[int]]:
    """The whole data set in its own order, in global batches; the last is filled up with -1 (a sample of padding)."""
    size = plan.global_batch_size
    ids = list(range(len(dataset)))
    ids += [-1] * (-len(ids) % size)
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def assemble(dataset: TokenDataset, plan: BatchPlan, ids: Sequence[int]) -> StepBatch:
    """Microbatches of this data-parallel rank out of the global batch `ids`, all padded to one length.

    The length is that of the longest sample of the *global* batch, so every rank computes the same one without
    asking; microbatch m of rank d takes the ids m x B x dp + d x B onwards.
    """
    lengths = [int(dataset.lengths[i]) for i in ids if i >= 0]  # positions: the last token is only a target
    longest = max(max(lengths, default=1), 1)
    seq_length = -(-longest // plan.seq_multiple) * plan.seq_multiple
    stride = plan.micro_batch_size * plan.dp_size
    microbatches = []
    for start in range(0, len(ids), stride):
        first = start + plan.dp_rank * plan.micro_batch_size
        microbatches.append(_microbatch(dataset, ids[first : first + plan.micro_batch_size], seq_length, plan))
    tokens = sum(lengths)
    return StepBatch(microbatches, list(ids), seq_length, tokens, len(ids) * seq_length - tokens)


def _microbatch(dataset: TokenDataset, ids: Sequence[int], seq_length: int, plan: BatchPlan) -> Microbatch:
    """Collate samples; id -1 is a row of padding without loss. Tensors [B, S] on the CPU."""
    samples = [dataset.sample(i) for i in ids if i >= 0]
    tokens, labels, weights = collate(samples, seq_length, plan.pad_token_id)
    missing = len(ids) - len(samples)
    if missing:
        tokens, labels, weights = (
            np.concatenate([a, np.full((missing, seq_length), fill, a.dtype)])
            for a, fill in ((tokens, plan.pad_token_id), (labels, 0), (weights, 0))
        )
    return Microbatch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(weights))
