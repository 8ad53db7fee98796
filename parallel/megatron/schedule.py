"""Forward and backward over the microbatches of a step, through megatron-core's schedules (1F1B, interleaved).

Shapes: b microbatch size, s padded sequence length, v vocabulary columns of one tensor-parallel rank, V all of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from mswift.errors import LayoutError


@dataclass(frozen=True)
class Microbatch:
    """`labels` are shifted already: labels[:, t] is the target of position t. Any device.

    tokens, labels: int64 [b, s]; loss_weights: float32 [b, s], 0 where there is nothing to learn.
    """

    tokens: Tensor
    labels: Tensor
    loss_weights: Tensor


@dataclass(frozen=True)
class StepResult:
    """One finished optimizer step. `seconds`: forward_backward (with gradient reduction) and optimizer.

    loss: mean over the global batch, weighted; num_tokens: the sum of weights; grad_norm: global, before clipping.
    """

    loss: float
    num_tokens: float
    grad_norm: float
    seconds: Mapping[str, float] = field(default_factory=dict)


def run(
    chunks: Sequence[nn.Module], microbatches: Sequence[Microbatch], device: torch.device, *, forward_only: bool
) -> float:
    """Sum of weighted losses of this data-parallel rank; 0.0 on all pipeline stages but the last."""
    _check_shapes(microbatches)
    data = [_inputs(microbatches, device) for _ in chunks]
    collected = _schedule(chunks, _weighted_loss, data, microbatches[0].tokens, len(microbatches), forward_only)
    return sum((float(value) for value in collected), 0.0)


def logits(chunks: Sequence[nn.Module], tokens: Tensor, vocab_size: int, device: torch.device) -> Tensor:
    """[b, s] -> [b, s, V] on every rank of the pipeline and tensor-parallel group."""
    tokens = tokens.to(device)
    tp, pp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()
    copies = 1  # the interleaved schedule takes microbatches in groups
    if len(chunks) > 1:
        copies = get_model_config(chunks[0]).microbatch_group_size_per_vp_stage
    data = [iter([(tokens, None, None)] * copies) for _ in chunks]
    collected = _schedule(chunks, _keep_output, data, tokens, copies, True, collect_non_loss_data=True)
    width = -(-vocab_size // tp.size())
    dtype = next(chunks[0].parameters()).dtype
    local = collected[0] if collected else torch.empty((*tokens.shape, width), dtype=dtype, device=device)
    if pp.size() > 1:
        dist.broadcast(local, src=dist.get_global_rank(pp, pp.size() - 1), group=pp)
    parts = [torch.empty_like(local) for _ in range(tp.size())]
    dist.all_gather(parts, local.contiguous(), group=tp)
    return torch.cat(parts, dim=-1)[..., :vocab_size]


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


def _check_shapes(microbatches: Sequence[Microbatch]) -> None:
    shape = microbatches[0].tokens.shape
    for batch in microbatches:
        if batch.tokens.shape != shape:
            raise LayoutError(
                f"microbatches of one step differ in shape: {tuple(batch.tokens.shape)} and {tuple(shape)}"
            )


def _inputs(microbatches: Sequence[Microbatch], device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return ((b.tokens.to(device), b.labels.to(device), b.loss_weights.to(device)) for b in microbatches)


def _schedule(
    chunks: Sequence[nn.Module],
    finish: Callable[[Tensor, Tensor | None], object],
    data: Sequence[Iterator[tuple[Tensor, Tensor | None, Tensor | None]]],
    tokens: Tensor,
    num_microbatches: int,
    forward_only: bool,
    **options: object,
) -> list[Tensor]:
    """megatron-core's schedule for this layout, with the microbatches for each chunk; what the last one collected."""

    def forward(
        inputs: Iterator[tuple[Tensor, Tensor | None, Tensor | None]], model: nn.Module
    ) -> tuple[Tensor, object]:
        tokens, labels, weights = next(inputs)
        return model(tokens, None, None, labels=labels), finish_with(weights)

    def finish_with(weights: Tensor | None) -> object:
        return lambda output, **_: finish(output, weights)

    return get_forward_backward_func()(  # type: ignore[no-any-return]
        forward_step_func=forward,
        data_iterator=list(data),
        model=list(chunks),
        num_microbatches=num_microbatches,
        seq_length=tokens.shape[1],
        micro_batch_size=tokens.shape[0],
        forward_only=forward_only,
        **options,
    )


def _weighted_loss(losses: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [b, s] -> (what is differentiated, tokens as megatron-core counts them, what is collected)."""
    assert weights is not None
    total = (losses * weights).sum()
    return total, torch.zeros((), dtype=torch.int, device=losses.device), total.detach()


def _keep_output(output: Tensor, _weights: Tensor | None) -> Tensor:
    return output
