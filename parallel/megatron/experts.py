"""The routed experts of a rank as one autograd step, and the way of tokens to experts that are all on one rank.

megatron-core runs each expert as a module of its own and joins the outputs. Here every product is written into its
place; the activation is computed again in the backward pass, so that of an expert's row [2 f + h] numbers are kept.

Shapes: n tokens, k experts of each, m = n * k rows sorted by expert, e experts, h hidden, f columns of an expert on
this rank, c = f, or 2 f where the activation is gated.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mswift.parallel.megatron.weight_gradients import add_weight_gradient


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, scale: Tensor, counts: Sequence[int], activation: Callable[[Tensor], Tensor], *weights: Tensor
    ) -> Tensor:
        ups, downs = weights[: len(counts)], weights[len(counts) :]
        inner = x.new_empty(len(x), ups[0].shape[0])
        for rows, up in zip(_segments(counts), ups, strict=True):
            torch.mm(x[rows], up.t(), out=inner[rows])
        scaled = (activation(inner) * scale.unsqueeze(-1)).to(x.dtype)
        out = x.new_empty(len(x), downs[0].shape[0])
        for rows, down in zip(_segments(counts), downs, strict=True):
            torch.mm(scaled[rows], down.t(), out=out[rows])
        ctx.save_for_backward(x, scale, inner, *weights)
        ctx.counts, ctx.activation = counts, activation
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, scale, inner, *weights = ctx.saved_tensors
        ups, downs = weights[: len(ctx.counts)], weights[len(ctx.counts) :]
        segments = list(_segments(ctx.counts))
        of_weights: list[Tensor | None] = [None] * len(weights)
        with torch.enable_grad():
            inputs = inner.detach().requires_grad_()
            activated = ctx.activation(inputs)
        scaled = (activated.detach() * scale.unsqueeze(-1)).to(x.dtype)
        of_scaled = torch.empty_like(scaled)
        for number, (rows, down) in enumerate(zip(segments, downs, strict=True), len(ups)):
            torch.mm(gradient[rows], down, out=of_scaled[rows])
            if ctx.needs_input_grad[4 + number]:
                of_weights[number] = add_weight_gradient(down, gradient[rows], scaled[rows])
        of_scale = (of_scaled * activated.detach().to(scale.dtype)).sum(-1)
        of_activated = (of_scaled * scale.unsqueeze(-1)).to(x.dtype)
        del scaled, of_scaled
        (of_inner,) = torch.autograd.grad(activated, inputs, of_activated)
        of_x = torch.empty_like(x)
        for number, (rows, up) in enumerate(zip(segments, ups, strict=True)):
            torch.mm(of_inner[rows], up, out=of_x[rows])
            if ctx.needs_input_grad[4 + number]:
                of_weights[number] = add_weight_gradient(up, of_inner[rows], x[rows])
        return of_x, of_scale, None, None, *of_weights


def _segments(counts: Sequence[int]) -> Iterator[slice]:
    """The rows of each expert."""
    return (slice(first, after) for first, after in pairwise(accumulate(counts, initial=0)))


class Experts(SequentialMLP):
    """megatron-core's experts, modules and names as they are, computed together where they are plain linears.

    Experts with biases, with adapters or in four bits are computed one after the other, as megatron-core does.
    """

    def forward(self, x: Tensor, tokens_per_expert: Tensor, scale: Tensor) -> tuple[Tensor, None]:
        """x [m, h], weights of the router [m] -> ([m, h], no bias)."""
        if not all(_is_plain(expert.linear_fc1, expert.linear_fc2) for expert in self.local_experts):
            return super().forward(x, tokens_per_expert, scale)  # type: ignore[no-any-return]
        experts = list(self.local_experts)
        weights = [expert.linear_fc1.weight for expert in experts] + [expert.linear_fc2.weight for expert in experts]
        counts = tokens_per_expert.tolist()
        return _Experts.apply(x, scale, counts, experts[0].activation_func, *weights), None  # type: ignore[no-untyped-call]


def _is_plain(up: Any, down: Any) -> bool:
    own = type(up) is ColumnParallelLinear and type(down) is RowParallelLinear
    changed = up._forward_hooks or down._forward_hooks or "_forward_impl" in vars(up)
    return own and not changed and not up.gradient_accumulation_fusion


class _ToExperts(torch.autograd.Function):
    """x [n, h] -> the rows [m, h] of tokens [m]; places [n, k] are those of a token's rows."""

    @staticmethod
    def forward(ctx, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.places = places
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        return _summed(gradient, ctx.places), None, None


class _FromExperts(torch.autograd.Function):
    """rows [m, h] -> the sum [n, h] of those of each token."""

    @staticmethod
    def forward(ctx, rows: Tensor, tokens: Tensor, places: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.tokens = tokens
        return _summed(rows, places)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        return gradient.index_select(0, ctx.tokens), None, None


def _summed(rows: Tensor, places: Tensor) -> Tensor:
    first, *others = places.unbind(1)
    total = rows.index_select(0, first)
    for place in others:
        total += rows.index_select(0, place)
    return total


class LocalDispatcher:
    """In place of megatron-core's token dispatchers where every expert is on this rank, whole.

    Tokens are copied once, sorted by expert, and summed once; nothing is exchanged.
    """

    shared_experts = None

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k

    @staticmethod
    def fits(config: TransformerConfig, replaced: MoETokenDispatcher) -> bool:
        """Whether that is all that `replaced` would do."""
        alone = replaced.ep_size == 1 and replaced.tp_size == 1
        plain = config.moe_token_dispatcher_type == "alltoall" and config.cuda_graph_impl == "none"
        return alone and plain and not config.moe_shared_expert_overlap

    def dispatch_preprocess(self, x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, h], chosen [n, e] bool (k of each row), weights [n, e] -> rows [m, h], their weights [m]."""
        by_expert = chosen.t().contiguous()
        self._shape, self._counts = x.shape, by_expert.sum(dim=1)
        self._tokens = by_expert.nonzero()[:, 1]
        self._places = self._tokens.argsort(stable=True).view(-1, self._top_k)
        rows = _ToExperts.apply(x.flatten(0, -2), self._tokens, self._places)  # type: ignore[no-untyped-call]
        return rows, weights.t().masked_select(by_expert)

    def token_dispatch(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """They are where they belong."""
        return rows, weights

    def dispatch_postprocess(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With the number of rows of each expert [e]."""
        return rows, self._counts, weights

    def combine_preprocess(self, rows: Tensor) -> Tensor:
        """As they are."""
        return rows

    def token_combine(self, rows: Tensor) -> Tensor:
        """As they are."""
        return rows

    def combine_postprocess(self, rows: Tensor) -> Tensor:
        """[m, h] -> [s, b, h]."""
        summed: Tensor = _FromExperts.apply(rows, self._tokens, self._places)  # type: ignore[no-untyped-call]
        return summed.view(self._shape)
