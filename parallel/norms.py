"""Norms for megatron-core's layer specs that allow sequence parallelism. Shapes: [..., width].

Their parameters are replicated over tensor-parallel ranks. Under sequence parallelism each of them sees another part
of the sequence, so they are marked for megatron-core, which then sums their gradients over the ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mswift.converters.spec import ModelSpec


def replicated(config: object, width: int) -> nn.Parameter:
    """An empty vector of a norm, marked as its gradient has to be summed."""
    dtype: torch.dtype = config.params_dtype  # type: ignore[attr-defined]
    vector = nn.Parameter(torch.empty(width, dtype=dtype, device=torch.cuda.current_device()))
    vector.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return vector


class _RmsNorm(torch.autograd.Function):
    """fp32 on a CPU, where torch's F.rms_norm is a chain of operations which keeps two more tensors like x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[no-untyped-def]
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        products = gradient * normed
        along = torch.mv(products.flatten(0, -2), weight).div_(-x.shape[-1]).view(inverse.shape)
        of_weight = products.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        of_x = torch.mul(gradient, weight, out=products).addcmul_(normed, along).mul_(inverse)
        return of_x, of_weight, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019), one fused step of autograd."""

    def __init__(self, config: object, hidden_size: int, eps: float = 1e-5, **_unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = replicated(config, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., width]; the mean square is taken in fp32."""
        if x.device.type == "cpu" and x.dtype == torch.float32:
            return _RmsNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return, no-untyped-call]
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight), as Gemma stores it; computed in fp32, since 1 + weight has no room in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., width]."""
        return F.rms_norm(x.float(), (x.shape[-1],), 1.0 + self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / standard deviation * weight + bias over the last dimension (Ba et al. 2016)."""

    def __init__(self, config: object, hidden_size: int, eps: float = 1e-5, **_unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = replicated(config, hidden_size)
        self.bias = replicated(config, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., width]."""
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


def norm_class(spec: ModelSpec) -> type[nn.Module]:
    """The norm of the model's residual stream and of its heads."""
    if spec.norm == "layer":
        return LayerNorm
    return ZeroCenteredRMSNorm if spec.zero_centered_norm else RMSNorm
