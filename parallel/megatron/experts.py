"""The routed experts of a rank as one autograd step, and the way of tokens to experts that are all on one rank.

megatron-core runs each expert as a module of its own and joins the outputs. Here every product is written into its
place; the activation is computed again in the backward pass, so that of an expert's row [2 f + h] numbers are kept.

Shapes: n tokens, k experts of each, m = n * k rows sorted by expert, e experts, h hidden, f columns of an expert on
this rank, c = f, or 2 f where the activation is gated.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mswift.parallel.megatron.weight_gradients import add_weight_gradient


class _Linear(NamedTuple):
    """weight [o, i]; of an adapter a [r, i] and b [o, r], which add factor * b @ a to it."""

    weight: Tensor
    a: Tensor | None
    b: Tensor | None
    factor: float

    def write(self, x: Tensor, out: Tensor) -> None:
        """Product with x [n, i] into out [n, o]."""
        torch.mm(x, self.weight.t(), out=out)
        if self.a is not None and self.b is not None:
            out.addmm_(torch.mm(x, self.a.t()), self.b.t(), alpha=self.factor)

    def differentiate(self, gradient: Tensor, x: Tensor, of_x: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """The gradient of x into of_x; those of weight, a and b that are wanted."""
        torch.mm(gradient, self.weight, out=of_x)
        found: list[Tensor | None] = [add_weight_gradient(self.weight, gradient, x) if wanted[0] else None, None, None]
        if self.a is not None and self.b is not None:
            between = torch.mm(gradient, self.b).mul_(self.factor)
            of_x.addmm_(between, self.a)
            found[1] = torch.mm(between.t(), x) if wanted[1] else None
            found[2] = torch.mm(gradient.t(), torch.mm(x, self.a.t())).mul_(self.factor) if wanted[2] else None
        return found


class _Plan(NamedTuple):
    """What is no tensor: rows of each expert, factors of the adapters of all first and all second linears."""

    counts: Sequence[int]
    factors: Sequence[float]
    activation: Callable[[Tensor], Tensor]

    def linears(self, tensors: Sequence[Any], second: bool) -> Iterator[tuple[slice, slice, _Linear]]:
        """(its tensors, its rows, a linear) of each expert; tensors are (weight, a, b) of each of `factors`."""
        for expert, (first, after) in enumerate(pairwise(accumulate(self.counts, initial=0))):
            number = len(self.counts) * second + expert
            own = slice(3 * number, 3 * number + 3)
            weight, a, b = tensors[own]
            yield own, slice(first, after), _Linear(weight, a, b, self.factors[number])


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, plan: _Plan, *tensors: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ups, downs = (list(plan.linears(tensors, second)) for second in (False, True))
        inner = x.new_empty(len(x), ups[0][-1].weight.shape[0])
        for _, rows, linear in ups:
            linear.write(x[rows], inner[rows])
        scaled = _scaled(plan.activation(inner), scale)
        out = x.new_empty(len(x), downs[0][-1].weight.shape[0])
        for _, rows, linear in downs:
            linear.write(scaled[rows], out[rows])
        ctx.save_for_backward(x, scale, inner, *tensors)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        plan: _Plan = ctx.plan
        x, scale, inner, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        found: list[Tensor | None] = [None] * len(tensors)
        with torch.enable_grad():
            inputs = inner.detach().requires_grad_()
            activated = plan.activation(inputs)
        scaled = (activated.detach() * scale.unsqueeze(-1)).to(x.dtype)
        of_scaled = torch.empty_like(scaled)
        for own, rows, linear in plan.linears(tensors, second=True):
            found[own] = linear.differentiate(gradient[rows], scaled[rows], of_scaled[rows], wanted[own])
        del scaled
        of_scale = (of_scaled * activated.detach().to(scale.dtype)).sum(-1)
        (of_inner,) = torch.autograd.grad(activated, inputs, _scaled(of_scaled, scale))
        of_x = torch.empty_like(x)
        for own, rows, linear in plan.linears(tensors, second=False):
            found[own] = linear.differentiate(of_inner[rows], x[rows], of_x[rows], wanted[own])
        return of_x, of_scale, None, *found


def _scaled(rows: Tensor, scale: Tensor) -> Tensor:
    """rows [m, f] by scale [m], in the memory of rows where their dtypes are the same."""
    factors = scale.unsqueeze(-1)
    return rows.mul_(factors) if rows.dtype == scale.dtype else (rows * factors).to(rows.dtype)


class Experts(SequentialMLP):
    """megatron-core's experts, modules and names as they are, computed together where they are plain linears.

    Adapters without dropout are part of that. Experts with biases, in four bits, or with other adapters are computed
    one after the other, as megatron-core does.
    """

    def forward(self, x: Tensor, tokens_per_expert: Tensor, scale: Tensor) -> tuple[Tensor, None]:
        """x [m, h], weights of the router [m] -> ([m, h], no bias)."""
        linears = [getattr(expert, name) for name in ("linear_fc1", "linear_fc2") for expert in self.local_experts]
        if not all(_is_plain(linear) for linear in linears):
            return super().forward(x, tokens_per_expert, scale)  # type: ignore[no-any-return]
        factors = [linear.lora.scale if hasattr(linear, "lora") else 0.0 for linear in linears]
        plan = _Plan(tokens_per_expert.tolist(), factors, self.local_experts[0].activation_func)
        tensors = [tensor for linear in linears for tensor in _tensors(linear)]
        return _Experts.apply(x, scale, plan, *tensors), None  # type: ignore[no-untyped-call]


def _is_plain(linear: Any) -> bool:
    own = type(linear) in (ColumnParallelLinear, RowParallelLinear) and not linear.gradient_accumulation_fusion
    adapted = hasattr(linear, "lora")
    known = len(linear._forward_hooks) == adapted and "_forward_impl" not in vars(linear)
    return own and known and not (adapted and (linear.lora.dora or linear.lora.drops))


def _tensors(linear: Any) -> tuple[Tensor | None, ...]:
    return (linear.weight, *(linear.lora.matrices() if hasattr(linear, "lora") else (None, None)))


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
