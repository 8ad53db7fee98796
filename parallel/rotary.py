"""Rotary position embedding (Su et al. 2021), computed as transformers does, bit for bit.

Shapes: s sequence, b batch, d head dimension, r rotated dimensions (the first of a head; r = d unless the rope is
partial). Pairs that are rotated against each other: the two halves of r ("rotate_half"), or neighbours (interleaved).
"""

import math

import torch
from torch import Tensor

from mswift.converters.spec import RopeSpec
from mswift.errors import ConfigError
from mswift.parallel.attention.share import Share, positions


def inverse_frequencies(rope: RopeSpec, head_dim: int, length: int = 0) -> Tensor:
    """[r / 2] fp32 angles per position step; kinds as transformers.modeling_rope_utils defines them.

    length: of the sequences; "longrope" has other factors beyond `original_max_position_embeddings`. Raises
    ConfigError for sequences so long that "dynamic" would change its frequencies from one batch to the next.
    """
    dim = rope.rotary_dim or head_dim
    if rope.kind == "yarn":
        return _yarn(rope, dim)
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
    if rope.kind == "longrope":
        is_long = length > rope.original_max_position_embeddings
        factors = torch.tensor(rope.long_factor if is_long else rope.short_factor, dtype=torch.float32)
        return 1.0 / (factors * rope.theta**exponent)
    plain = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "dynamic" and length > rope.original_max_position_embeddings:
        raise ConfigError(
            f"rope_scaling of type 'dynamic' with sequences of {length} tokens: beyond "
            f"{rope.original_max_position_embeddings} its frequencies depend on what was computed before; "
            "shorten --max_length, or use yarn"
        )
    return plain


def attention_factor(rope: RopeSpec) -> float:
    """What cos and sin are multiplied by: given, or as YaRN (Peng et al. 2023) and LongRoPE (Ding et al. 2024) say."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "yarn":
        if rope.mscale and rope.mscale_all_dim:
            return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
        return _mscale(rope.factor, 1.0)
    if rope.kind == "longrope" and rope.factor > 1.0:
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
    return 1.0


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(rope: RopeSpec, dim: int) -> Tensor:
    """YaRN: dimensions that turn often are kept, those that turn rarely stretched by `factor`, a ramp in between."""
    powers = rope.theta ** (torch.arange(0, dim, 2).to(torch.float32) / dim)
    kept, stretched = 1.0 / powers, 1.0 / (rope.factor * powers)

    def dimension(turns: float) -> float:
        """Where a dimension pair turns so often within the original length."""
        length = rope.original_max_position_embeddings
        return (dim * math.log(length / (turns * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)
    keep = 1 - torch.clamp(ramp, 0, 1)
    return stretched * (1 - keep) + kept * keep


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
        self.interleaved = rope.interleaved
        self._rope, self._head_dim, self._device = rope, head_dim, device
        self._factor = attention_factor(rope)
        self._cached: dict[tuple[int | Share, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, of: int | Share, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [s, 1, 1, r / 2] in `dtype`: of positions 0..of-1, or of the rows of a share."""
        found = self._cached.get((of, dtype))
        if found is None:
            found = self._selected(of, dtype) if isinstance(of, Share) else self._computed(of, dtype)
            self._cached[(of, dtype)] = found
            if len(self._cached) > 8:  # lengths vary from step to step; keep the newest
                self._cached.pop(next(iter(self._cached)))
        return found

    def _selected(self, share: Share, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows = positions(share, self._device)
        cos, sin = self(max(share.lengths), dtype)
        return cos[rows], sin[rows]

    def _computed(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequencies = inverse_frequencies(self._rope, self._head_dim, length).to(self._device)
        positions = torch.arange(length, dtype=torch.float32, device=self._device)
        angles = torch.outer(positions, frequencies)[:, None, None, :]
        return (angles.cos() * self._factor).to(dtype), (angles.sin() * self._factor).to(dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotated(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin, ctx.interleaved), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    one, other = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    first, second = x[..., one], x[..., other]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., one]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., other]).addcmul_(first, sin)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first r dimensions of [s, b, heads, d] (any strides) by its positions; the result is contiguous."""
    return _Rotate.apply(x, cos, sin, interleaved)  # type: ignore[no-any-return, no-untyped-call]
