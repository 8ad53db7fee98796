"""Rotary position embedding (Su et al. 2021), computed as transformers does, bit for bit.

Shapes: s sequence, b batch, d head dimension. Halves of a head are rotated against each other ("rotate_half").
"""

import math

import torch
from torch import Tensor

from mswift.converters.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """[d / 2] fp32 angles per position step; kinds as transformers.modeling_rope_utils defines them."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponent)
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    return _llama3(plain, rope)


def _llama3(plain: Tensor, rope: RopeSpec) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    length = rope.original_max_position_embeddings
    low_wavelength, high_wavelength = length / rope.low_freq_factor, length / rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > low_wavelength, plain / rope.factor, plain)
    smooth = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * stretched / rope.factor + smooth * stretched
    is_between = ~(wavelength < high_wavelength) * ~(wavelength > low_wavelength)
    return torch.where(is_between, between, stretched)


class RotaryTable:
    """cos and sin of one model, computed once per (length, dtype) and shared by its layers."""

    def __init__(self, rope: RopeSpec, head_dim: int, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)
        self._cached: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [s, 1, 1, d / 2] in `dtype`, of positions 0..length-1."""
        found = self._cached.get((length, dtype))
        if found is None:
            positions = torch.arange(length, dtype=torch.float32, device=self._frequencies.device)
            angles = torch.outer(positions, self._frequencies)[:, None, None, :]
            found = self._cached[(length, dtype)] = (angles.cos().to(dtype), angles.sin().to(dtype))
            if len(self._cached) > 8:  # lengths vary from step to step; keep the newest
                self._cached.pop(next(iter(self._cached)))
        return found


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [s, b, heads, d] (any strides) by its positions; the result is contiguous."""
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]
