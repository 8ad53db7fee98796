"""Forward and backward over the microbatches of a step, through megatron-core's schedules (1F1B, interleaved).

Shapes: b microbatch size, s padded sequence length, n context-parallel ranks, v vocabulary columns of one
tensor-parallel rank, V all of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

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


@dataclass(frozen=True)
class StepResult:
    """One finished optimizer step. `seconds`: forward_backward (with gradient reduction) and optimizer.

    loss: mean over the global batch, weighted; num_tokens: the sum of weights; grad_norm: global, before clipping.
    mtp_loss: of the multi-token-prediction layers where they are trained, the mean over them, divided by num_tokens as
    the loss is; what is minimised is loss + mtp_loss_scaling_factor * mtp_loss.
    updated: False where loss or grad_norm are not finite on some rank; weights and optimizer are then as before.
    """

    loss: float
    num_tokens: float
    grad_norm: float
    updated: bool
    seconds: Mapping[str, float] = field(default_factory=dict)
    mtp_loss: float | None = None


def run(
    chunks: Sequence[nn.Module], batches: Sequence[RankBatch], device: torch.device, *, forward_only: bool
) -> tuple[float, float]:
    """Sums of weighted losses of this rank's positions; 0.0 on all pipeline stages but the last.

    The second is that of multi-token prediction, the mean over its layers; 0.0 where batches have no `ahead`.
    """
    if not batches[0].ahead:
        collected = _schedule(chunks, _weighted_loss, batches, device, forward_only)
        return sum((float(value) for value in collected), 0.0), 0.0
    scale = get_model_config(chunks[0]).mtp_loss_scaling_factor
    sums = _schedule(chunks, partial(_with_predictions, scale), batches, device, forward_only)
    return sum((float(value[0]) for value in sums), 0.0), sum((float(value[1:].mean()) for value in sums), 0.0)


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
        further = {"ahead": [_ahead(part, device) for part in batch.ahead]} if batch.ahead else {}
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


def _with_predictions(scale: float, sums: Tensor, _weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the sums [1 + depths] that a model returns which predicts further ahead."""
    total = sums[0] + scale * sums[1:].mean()
    return total, torch.zeros((), dtype=torch.int, device=sums.device), sums.detach()


def _ahead(batch: RankBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return batch.tokens.to(device), batch.labels.to(device), batch.loss_weights.to(device)


def _keep_output(output: Tensor, _weights: Tensor) -> Tensor:
    return output
