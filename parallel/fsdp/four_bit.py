"""Linears of a transformers model on four bits a weight: whole on every rank, since bitsandbytes' codes are one tensor.

Shapes: i, o features of a linear.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mswift.errors import ConfigError, LayoutError
from mswift.parallel.four_bit import BLOCK, Kind, PackedWeight, library, pack


class _Product(torch.autograd.Function):
    """Keeps no weight for the backward pass, but makes it again."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        """x [..., i] -> [..., o]."""
        ctx.packed = packed
        return F.linear(x, packed.whole(), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        """Gradient of x."""
        return gradient @ ctx.packed.whole(), None, None


def pack_linears(layers: list[nn.Module], kind: Kind, device: torch.device) -> list[nn.Parameter]:
    """Let the linears of these layers, without memory yet, keep four bits a weight; their weights.

    LayoutError for rows that are no whole blocks, ConfigError where bitsandbytes is missing.
    """
    library()
    found = []
    for layer in layers:
        for name, module in layer.named_modules():
            if type(module) is not nn.Linear or ".lora_" in f".{name}.":
                continue
            if module.in_features % BLOCK:
                raise LayoutError(
                    f"--quant_bits 4: {name} has {module.in_features} inputs, which are no whole blocks of {BLOCK}: "
                    "leave --quant_method out"
                )
            values = torch.empty_like(module.weight, device=device)
            module.weight = nn.Parameter(values, requires_grad=False)
            _multiply_by(module, pack(module.weight, kind))
            found.append(module.weight)
    if not found:
        raise ConfigError("--quant_method bnb: the model has no linears in its layers: use --backend megatron")
    return found


def _multiply_by(module: nn.Linear, packed: PackedWeight) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, packed, self.bias)  # type: ignore[no-untyped-call]
        return out

    module.forward = MethodType(forward, module)  # type: ignore[method-assign]
