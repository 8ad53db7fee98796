"""megatron-core's two linear functions for CPUs: the faster fp32 matrix product, and no passing gradients of weights.

That of a frozen weight is in its place on GPUs as well: megatron-core's gives a bias beside such a weight no gradient.

torch's own product is MKL's, which leaves half of the speed of an AMD processor unused: 100 against 220 GFLOP/s on
one core of an EPYC (`benchmarks/gemm.py`); on an Intel Xeon it is the faster one. The maker of the processor decides,
not a clock: a resumed run computes the same bits. Both compute in IEEE fp32. oneDNN compiles a kernel for every shape
(2 to 4 ms and 1 MiB, 1024 of them kept): `experts.py`, whose numbers of rows change with every batch, has torch's.
Communication is megatron-core's: input gathered again in backward under sequence parallelism, reduction of the input
gradient beside the weight's product.

Shapes: n tokens of this rank's input (n * tp after the gather), i in, o out.
"""

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mswift.parallel.megatron.weight_gradients import add_weight_gradient


@cache
def prefers_onednn() -> bool:
    """Whether this torch can be asked for oneDNN's product, and this processor is one on which it is the faster."""
    known = _is_amd() and torch.backends.mkldnn.is_available()
    return known and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_amd() -> bool:
    """Whether Linux says that an x86 processor of AMD is at work."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., k] @ weight [m, k]^T -> [..., m], on any device; of fp32 the faster one."""
    return onednn_product(x, weight) if _by_onednn(x, weight) else torch.matmul(x, weight.t())


def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """The same by oneDNN: fp32, on a CPU, of at least one element each."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # type: ignore[no-any-return]


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return _is_for_onednn(x) and x.numel() > 0 and weight.numel() > 0


def _is_for_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and prefers_onednn()


def _weight_gradient(weight: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    """What backward returns for a weight, of gradient [n, o] and x [n, i].

    All microbatches of a step go one way, those of an expert without rows as well: once a gradient was added to the
    buffer, the data-parallel wrapper leaves out what autograd brings of that weight until the step's end.
    """
    if _is_for_onednn(gradient):
        return product(gradient.t(), x.t())
    return add_weight_gradient(weight, gradient, x)


class CpuLinear(torch.autograd.Function):
    """In place of LinearWithGradAccumulationAndAsyncCommunication; called with its arguments."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        _fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        _grad_output_buffer: None,
        _wgrad_deferral_limit: None,
        tp_group: dist.ProcessGroup,
    ) -> Tensor:
        """x [n, b, i] (n of the whole sequence without sequence parallelism) -> [n * tp, b, o]."""
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.group = bias is not None, tp_group
        ctx.allreduce, ctx.sequence_parallel = allreduce_dgrad, sequence_parallel
        out = product(_gathered(x, tp_group) if sequence_parallel else x, weight)
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        grad_x = product(gradient, weight.t())
        total, waiting = x, None
        if ctx.sequence_parallel:
            total, whole = _gathered(x, ctx.group), grad_x
            grad_x = torch.empty_like(x)
            waiting = dist.reduce_scatter_tensor(grad_x, whole, group=ctx.group, async_op=True)
        elif ctx.allreduce:
            waiting = dist.all_reduce(grad_x, group=ctx.group, async_op=True)
        flat = gradient.reshape(-1, gradient.shape[-1])
        total = total.reshape(-1, total.shape[-1])
        grad_weight = _weight_gradient(weight, flat, total)
        grad_bias = flat.sum(dim=0) if ctx.has_bias else None
        if waiting is not None:
            waiting.wait()
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None


class FrozenLinear(torch.autograd.Function):
    """In place of LinearWithFrozenWeight, on any device; called with its arguments."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, allreduce_dgrad: bool, tp_group: dist.ProcessGroup
    ) -> Tensor:
        """x [n, b, i] -> [n, b, o]."""
        ctx.save_for_backward(weight)
        ctx.allreduce, ctx.group = allreduce_dgrad, tp_group
        out = product(x, weight)
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        """Gradients of x, and of a bias that is trained."""
        (weight,) = ctx.saved_tensors
        grad_x = product(gradient, weight.t())
        if ctx.allreduce:
            dist.all_reduce(grad_x, group=ctx.group)
        grad_bias = gradient.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, None, None


def replace_linears(layers: ModuleType, *, on_gpu: bool) -> None:
    """Put them into megatron.core.tensor_parallel.layers."""
    replaced: dict[str, Any] = {"LinearWithFrozenWeight": FrozenLinear}
    if not on_gpu:
        replaced["LinearWithGradAccumulationAndAsyncCommunication"] = CpuLinear
    for name, function in replaced.items():
        setattr(layers, name, function)


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, ...] of every rank -> [n * tp, ...]."""
    out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out
