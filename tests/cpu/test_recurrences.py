"""The chunked recurrences against their definitions, step by step: exact in fp64, and in fp32 without lost digits."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mswift.parallel.delta_rule import gated_delta_rule, unit_length
from mswift.parallel.state_space import causal_convolution, state_space_scan

B, G, R, P, N = 2, 3, 2, 5, 4  # batch, groups, heads a group, head dimension, state size (key dimension)
CHUNK = 8


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """In chunks of 8."""
    return state_space_scan(x, dt, a, b, c, CHUNK)


def scan_by_steps(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    state, out = x.new_zeros(B, G, R, P, N), []
    for t in range(x.shape[1]):
        added = torch.einsum("bgrp,bgn->bgrpn", x[:, t] * dt[:, t, ..., None], b[:, t])
        state = state * (dt[:, t] * a).exp()[..., None, None] + added
        out.append(torch.einsum("bgrpn,bgn->bgrp", state, c[:, t]))
    return torch.stack(out, 1)


def delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """With queries and keys of unit length."""
    return gated_delta_rule(unit_length(q), unit_length(k), v, log_decay, beta)


def delta_by_steps(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    q, k = unit_length(q) * N**-0.5, unit_length(k)
    state, out = q.new_zeros(B, G, R, N, P), []
    for t in range(q.shape[1]):
        state = state * log_decay[:, t].exp()[..., None, None]
        error = v[:, t] - torch.einsum("bgrnp,bgn->bgrp", state, k[:, t])
        state = state + torch.einsum("bgn,bgrp->bgrnp", k[:, t], beta[:, t, ..., None] * error)
        out.append(torch.einsum("bgrnp,bgn->bgrp", state, q[:, t]))
    return torch.stack(out, 1)


def inputs(rule: str, length: int, decay: float) -> list[Tensor]:
    """fp64; up to `decay` in the exponent of each step."""
    torch.manual_seed(length)
    double = {"dtype": torch.float64}
    keys = [torch.randn(B, length, G, N, **double) for _ in range(2)]
    values = torch.randn(B, length, G, R, P, **double)
    gate = torch.rand(B, length, G, R, **double)
    if rule == "scan":
        return [values, gate, -decay * torch.rand(G, R, **double), *keys]
    return [*keys, values, -decay * torch.rand(B, length, G, R, **double), gate]


def with_gradients(rule: Callable[..., Tensor], tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradient of every input."""
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    out = rule(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).sin().view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


RULES = {"scan": (scan, scan_by_steps), "delta": (delta, delta_by_steps)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, 7, 8, 70])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_chunks_equal_steps(rule: str, length: int, dtype: torch.dtype, tolerance: float) -> None:
    """Also where a step leaves e^-20 of what was before: the sums of a chunk are then in the hundreds."""
    chunked, by_steps = RULES[rule]
    for decay in (0.5, 20.0):
        tensors = inputs(rule, length, decay)
        truth = with_gradients(by_steps, tensors, torch.float64)
        found = with_gradients(chunked, tensors, dtype)
        for ours, theirs in zip(found, truth, strict=True):
            assert torch.isfinite(ours).all()
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-30)


def test_the_convolution_sees_no_later_position() -> None:
    x, weight = torch.randn(9, 2, 6), torch.randn(6, 1, 4)
    whole, part = causal_convolution(x, weight, None), causal_convolution(x[:5], weight, None)
    torch.testing.assert_close(whole[:, :5], part)
    last = sum(weight[:, 0, j] * x[8 - 3 + j] for j in range(4))
    torch.testing.assert_close(whole[:, 8], torch.nn.functional.silu(last))
