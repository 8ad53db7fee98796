"""Cross-entropy over a vocabulary that is cut over tensor-parallel ranks. fp32 math, one own backward pass.

Shapes: n tokens (any leading dimensions), v local vocabulary columns. The vocabulary is padded at run time to a
multiple of the ranks; padded columns take no part in the softmax and get exactly zero gradient.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits: Tensor, labels: Tensor, first_row: int, vocab_size: int, group: dist.ProcessGroup
    ) -> Tensor:  # type: ignore[no-untyped-def]
        width = logits.shape[-1]
        num_real = num_real_columns(width, first_row, vocab_size)
        real = logits.reshape(-1, width)[:, :num_real].float()
        rows = labels.reshape(-1) - first_row
        scaled, total, loss = token_losses(real, rows, group)
        ctx.save_for_backward(scaled, total, rows)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return loss.view(labels.shape)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        scaled, total, rows = ctx.saved_tensors
        grad = logit_gradient(scaled, total, rows, gradient.reshape(-1, 1).float())
        num_tokens, num_real = grad.shape
        width = ctx.shape[-1]
        if num_real < width:
            padded = grad.new_zeros((num_tokens, width))
            padded[:, :num_real] = grad
            grad = padded
        return grad.to(ctx.dtype).view(ctx.shape), None, None, None, None


def num_real_columns(width: int, first_row: int, vocab_size: int) -> int:
    """How many of `width` local columns, the first of them row `first_row` of the vocabulary, are no padding."""
    return min(max(vocab_size - first_row, 0), width)


def token_losses(real: Tensor, rows: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor | None, Tensor]:
    """Losses [n] of fp32 logits [n, v] without padding, and the two tensors that `logit_gradient` wants.

    rows: labels [n], counted from this rank's first row of the vocabulary.
    """
    if group.size() == 1:
        scaled = torch.log_softmax(real, dim=-1)
        return scaled, None, -_gather(scaled, rows)
    return _reduce_over_ranks(real, rows, group)


def logit_gradient(scaled: Tensor, total: Tensor | None, rows: Tensor, weight: Tensor) -> Tensor:
    """Gradient [n, v] of sum(weight * losses), weight [n, 1], in the memory of `scaled` (see `token_losses`)."""
    grad = scaled.exp_().mul_(weight) if total is None else scaled.mul_(weight / total.unsqueeze(1))
    num_real = grad.shape[1]
    if num_real:
        mine = ((rows >= 0) & (rows < num_real)).unsqueeze(1)
        grad.scatter_add_(1, rows.clamp(0, num_real - 1).unsqueeze(1), torch.where(mine, -weight, 0.0))
    return grad


def _reduce_over_ranks(real: Tensor, rows: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """(exp(logits - max) [n, v], its sum over all ranks [n], loss [n]); `rows` count from this rank's first row."""
    num_real = real.shape[1]
    lowest = torch.finfo(torch.float32).min
    largest = real.amax(dim=1) if num_real else real.new_full((real.shape[0],), lowest)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    scaled = (real - largest.unsqueeze(1)).exp_()
    targets = _gather(real, rows)
    mine = (rows >= 0) & (rows < num_real)
    sums = torch.stack((scaled.sum(dim=1), torch.where(mine, targets - largest, 0.0)))
    dist.all_reduce(sums, group=group)
    return scaled, sums[0].clone(), sums[0].log() - sums[1]


def _gather(values: Tensor, rows: Tensor) -> Tensor:
    """values[t, rows[t]], and 0 for a row outside [n, v]."""
    num_real = values.shape[1]
    if not num_real:
        return values.new_zeros(rows.shape)
    found = values.gather(1, rows.clamp(0, num_real - 1).unsqueeze(1)).squeeze(1)
    return torch.where((rows >= 0) & (rows < num_real), found, 0.0)


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, *, first_row: int, vocab_size: int, group: dist.ProcessGroup
) -> Tensor:
    """Loss of every token [n] from local logits [n, v] and global labels [n]; the backward pass runs once.

    `first_row` is the vocabulary row of local column 0, `vocab_size` the real number of rows (without padding).
    A label outside the vocabulary marks a token whose loss means nothing; give it weight 0.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, first_row, vocab_size, group)  # type: ignore[no-any-return, no-untyped-call]
