"""RMSNorm over all heads of q (or of k), which tensor-parallel ranks hold in parts (OLMo 2).

Shapes: s sequence, b batch, n heads of this rank along any axes before the last, d head dimension.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn


class _SumOverRanks(torch.autograd.Function):
    """A sum over the ranks of a group which every one of them uses: so is its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return _summed(gradient, ctx.group), None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


class WidthRMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken over the `num_heads` heads of all ranks, in fp32.

    Each rank holds the weights of its heads, and the whole sequence: their gradients need no sum.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float, num_heads: int) -> None:
        super().__init__()
        self.eps, self.width = eps, num_heads * hidden_size
        self.group = parallel_state.get_tensor_model_parallel_group()
        local = self.width // self.group.size()
        self.weight = nn.Parameter(torch.empty(local, dtype=config.params_dtype, device=torch.cuda.current_device()))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, ..., d] with this rank's heads in between -> the same shape."""
        flat = x.flatten(2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if self.group.size() > 1:
            squares = _SumOverRanks.apply(squares, self.group)  # type: ignore[no-untyped-call]
        normed = flat * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight * normed).to(x.dtype).view(x.shape)
