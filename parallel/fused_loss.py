"""The output layer and its cross-entropy in one, piece by piece: the logits of a microbatch never exist as a whole.

Each piece is taken from hidden states to loss and, while its logits are there, on to the gradients of the hidden
states and of the weight, so that no matrix product is made twice; backward only multiplies by the incoming scalar.
That is why the loss weights of the tokens are part of it. (Wijmans et al. 2024, arXiv 2411.09009, and Liger Kernel, Hsu
et al. 2024, arXiv 2410.10989, do the like in Triton; this is PyTorch alone, on any device, and over ranks.)

Shapes: s sequence (s' of this rank, s / tp under sequence parallelism), b batch, n tokens, h hidden, v vocabulary
columns of this rank, V the vocabulary without padding.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mswift.config.loss import piece_tokens
from mswift.parallel.loss import logit_gradient, num_real_columns, token_losses
from mswift.parallel.megatron.cpu_linear import product


@dataclass(frozen=True)
class OutputLayer:
    """What becomes of hidden states on this rank: logits of `vocab_size` rows, of which this rank has some.

    first_row: the vocabulary row of the weight's row 0. Logits are divided by `divisor`, then `softcap` c makes
    c * tanh(x / c) of them. sequence_parallel: each rank of `group` has a part of the sequence.
    """

    vocab_size: int
    first_row: int
    group: dist.ProcessGroup
    sequence_parallel: bool = False
    divisor: float = 1.0
    softcap: float | None = None


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        layer: OutputLayer,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = [needed and differentiate for needed in ctx.needs_input_grad[:2]]
        grad_hidden = hidden.new_empty((hidden.shape[:-1].numel(), hidden.shape[-1])) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        num_real = num_real_columns(weight.shape[0], layer.first_row, layer.vocab_size)
        parts = layer.group.size() if layer.sequence_parallel else 1
        token_loss = torch.empty((parts, labels.numel() // parts), dtype=torch.float32, device=hidden.device)
        sums = []
        for part, states, rows, weights in _pieces(hidden, weight, labels, loss_weights, layer):
            losses, grad = _piece(states, weight[:num_real], rows, weights, layer, any(wanted))
            sums.append((losses * weights).sum())
            token_loss[:, part] = losses.view(parts, -1)
            if grad_weight is not None:
                grad_weight[:num_real] += product(grad.t(), states.t())
            if grad_hidden is not None:
                _store_hidden_gradient(grad_hidden[part], product(grad, weight[:num_real].t()), layer)
        if grad_hidden is not None and not layer.sequence_parallel and layer.group.size() > 1:
            dist.all_reduce(grad_hidden, group=layer.group)
        ctx.gradients = (
            None if grad_hidden is None else grad_hidden.view(hidden.shape),
            None if grad_weight is None else grad_weight.to(weight.dtype),
        )
        token_loss = token_loss.view(labels.shape)
        ctx.mark_non_differentiable(token_loss)
        return torch.stack(sums).sum(), token_loss

    @staticmethod
    def backward(ctx, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        gradients, ctx.gradients = ctx.gradients, None  # a second backward would scale them again
        assert gradients is not None, "backward through the fused loss runs once"
        hidden, weight = (None if grad is None else grad.mul_(gradient) for grad in gradients)
        return hidden, weight, None, None, None, None


def _pieces(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor, layer: OutputLayer
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(rows of this rank's hidden states, the states [n, h] of all its ranks, labels from the first row, weights)."""
    parts = layer.group.size() if layer.sequence_parallel else 1
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows = labels.reshape(parts, -1) - layer.first_row
    weights = loss_weights.reshape(parts, -1).float()
    size = max(piece_tokens(weight.shape[0]) // parts, 1)
    for start in range(0, flat.shape[0], size):
        part = slice(start, start + size)
        states = _gathered(flat[part], layer) if parts > 1 else flat[part]
        yield part, states, rows[:, part].reshape(-1), weights[:, part].reshape(-1)


def _piece(
    states: Tensor, weight: Tensor, rows: Tensor, weights: Tensor, layer: OutputLayer, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """Losses of a piece [n], and their weighted sum's gradient for states @ weight^T [n, v] in the states' dtype."""
    logits = scaled_logits(product(states, weight), layer.divisor, layer.softcap).float()
    scaled, total, losses = token_losses(logits, rows, layer.group)
    if not differentiate:
        return losses, logits
    grad = logit_gradient(scaled, total, rows, weights.unsqueeze(1))
    if layer.softcap is not None:
        grad.mul_(1 - (logits / layer.softcap).square_())
    return losses, (grad if layer.divisor == 1.0 else grad.div_(layer.divisor)).to(states.dtype)


def scaled_logits(logits: Tensor, divisor: float, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / divisor / softcap), in the logits' dtype."""
    if divisor != 1.0:
        logits = logits / divisor
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _gathered(states: Tensor, layer: OutputLayer) -> Tensor:
    """[n, h] of every rank -> [n * tp, h]."""
    out = states.new_empty((states.shape[0] * layer.group.size(), states.shape[1]))
    dist.all_gather_into_tensor(out, states.contiguous(), group=layer.group)
    return out


def _store_hidden_gradient(out: Tensor, grad: Tensor, layer: OutputLayer) -> None:
    """Put a piece's gradient, of this rank's part of the vocabulary, in its place; with sequence parallelism summed."""
    if layer.sequence_parallel:
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=layer.group)
    else:
        out.copy_(grad)


def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor, layer: OutputLayer
) -> tuple[Tensor, Tensor]:
    """Sum of loss_weights * cross-entropy (a scalar, fp32) of hidden [s', b, h], global labels and weights [s, b].

    Also the losses themselves [s, b], fp32, which carry no gradient.
    weight [v, h] is this rank's; it gets a gradient only if it requires one. A label outside the vocabulary marks a
    token whose loss means nothing; give it weight 0.
    """
    return _FusedLinearCrossEntropy.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden, weight, labels, loss_weights, layer, torch.is_grad_enabled()
    )
