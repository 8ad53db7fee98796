"""Forward and backward over the microbatches of a step, through megatron-core's schedules (1F1B, interleaved).

Shapes: b microbatch size, s padded sequence length, n context-parallel ranks, v vocabulary columns of one
tensor-parallel rank, V all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from mswift.parallel.batch import RankBatch, whole_rows
from mswift.parallel.megatron.documents import documents


class LossSums(NamedTuple):
    """Sums of weighted losses: all, of multi-token prediction (the mean over its layers), by channel."""

    loss: float
    mtp_loss: float
    channels: list[float]


def run(
    chunks: Sequence[nn.Module],
    batches: Sequence[RankBatch],
    device: torch.device,
    *,
    forward_only: bool,
    num_channels: int = 0,
) -> LossSums:
    """Sums over this rank's positions; 0.0 on all pipeline stages but the last, and where batches have no `ahead`."""
    depths = len(batches[0].ahead)
    if not depths and not num_channels:
        collected = _schedule(chunks, _weighted_loss, batches, device, forward_only)
        return LossSums(sum((float(value) for value in collected), 0.0), 0.0, [])
    scale = get_model_config(chunks[0]).mtp_loss_scaling_factor if depths else 0.0
    finish = partial(_of_sums, depths, scale)
    found = _schedule(chunks, finish, batches, device, forward_only, num_channels)
    ahead = [float(value[1 : 1 + depths].mean()) for value in found] if depths else []
    apart = [sum((float(value[1 + depths + n]) for value in found), 0.0) for n in range(num_channels)]
    return LossSums(sum((float(value[0]) for value in found), 0.0), sum(ahead, 0.0), apart)


def logits(
    chunks: Sequence[nn.Module], batch: RankBatch, num_positions: int, vocab_size: int, device: torch.device
) -> Tensor:
    """This rank's part of [b, s] -> [b, num_positions, V] on every rank that shares the model."""
    tp, pp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()
    copies = 1  # the interleaved schedule takes microbatches in groups
    if len(chunks) > 1:
        copies = get_model_config(chunks[0]).microbatch_group_size_per_vp_stage
    batches = [batch] * copies
    collected = _schedule(chunks, _keep_output, batches, device, True, with_loss=False, collect_non_loss_data=True)
    width = -(-vocab_size // tp.size())
    dtype = next(chunks[0].parameters()).dtype
    local = collected[0] if collected else torch.empty((*batch.tokens.shape, width), dtype=dtype, device=device)
    if pp.size() > 1:
        dist.broadcast(local, src=dist.get_global_rank(pp, pp.size() - 1), group=pp)
    columns = torch.cat(_gathered(local, tp), dim=-1)[..., :vocab_size]
    return whole_rows(_gathered(columns, parallel_state.get_context_parallel_group()), num_positions)


def _gathered(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def overlap_gradients(config: TransformerConfig, chunks: Sequence[DistributedDataParallel]) -> None:
    """With overlap_grad_reduce: no sum before the last microbatch of a step, and chunk by chunk (as Megatron-LM's)."""
    if not chunks[0].ddp_config.overlap_grad_reduce:
        return
    pauses = [chunk.no_sync for chunk in chunks]
    starts = [chunk.start_grad_sync for chunk in chunks]
    config.no_sync_func = pauses if len(chunks) > 1 else pauses[0]
    config.grad_sync_func = starts if len(chunks) > 1 else starts[0]


def forget(config: TransformerConfig) -> None:
    """Let go of the functions that hold the model."""
    config.finalize_model_grads_func = config.no_sync_func = config.grad_sync_func = None


def finalize_gradients(model: list[nn.Module], weight_sum: Tensor, **groups: object) -> None:
    """Sum gradients over data-parallel ranks, norms under sequence parallelism and tied embeddings; then divide.

    weight_sum: fp64 sum of loss weights of this data-parallel rank; becomes the global sum, by which is divided.
    """
    finalize_model_grads(model, weight_sum, **groups)


def _schedule(
    chunks: Sequence[nn.Module],
    finish: Callable[[Tensor, Tensor], object],
    batches: Sequence[RankBatch],
    device: torch.device,
    forward_only: bool,
    num_channels: int = 0,
    *,
    with_loss: bool = True,
    **options: object,
) -> list[Tensor]:
    """megatron-core's schedule for this layout, each chunk with all microbatches; what the last one collected."""

    def forward(inputs: Iterator[RankBatch], model: nn.Module) -> tuple[Tensor, object]:
        batch = next(inputs)
        packed = None if batch.documents is None else documents(batch.documents, device)
        labels = batch.labels.to(device) if with_loss else None
        weights = batch.loss_weights.to(device)
        further: dict[str, object] = {"ahead": [_ahead(part, device) for part in batch.ahead]} if batch.ahead else {}
        if num_channels:
            assert batch.channels is not None
            further["channels"] = batch.channels.to(device), num_channels
        output = model(
            batch.tokens.to(device),
            None,
            None,
            labels=labels,
            packed_seq_params=packed,
            loss_mask=weights,
            **further,
        )
        return output, finish_with(weights)

    def finish_with(weights: Tensor) -> object:
        return lambda output, **_: finish(output, weights)

    return get_forward_backward_func()(  # type: ignore[no-any-return]
        forward_step_func=forward,
        data_iterator=[iter(batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=batches[0].seq_length,
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=forward_only,
        **options,
    )


def _weighted_loss(losses: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [b, s], or their weighted sum -> (what is differentiated, tokens for megatron-core, what is collected)."""
    total = (losses * weights).sum() if losses.dim() else losses
    return total, torch.zeros((), dtype=torch.int, device=losses.device), total.detach()


def _of_sums(depths: int, scale: float, sums: Tensor, _weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the sums [1 + depths + channels] that a model returns."""
    total = sums[0] + scale * sums[1 : 1 + depths].mean() if depths else sums[0]
    return total, torch.zeros((), dtype=torch.int, device=sums.device), sums.detach()


def _ahead(batch: RankBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return batch.tokens.to(device), batch.labels.to(device), batch.loss_weights.to(device)


def _keep_output(output: Tensor, _weights: Tensor) -> Tensor:
    return output
