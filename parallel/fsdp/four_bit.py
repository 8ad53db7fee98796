"""Linears of a transformers model on four bits a weight: whole on every rank, or their rows cut over ranks.

Blocks of codes with one scale lie in a row, so that a row's codes are those that it has in the whole weight. Codes and
scales of cut ones are gathered as they are used, once forward, once backward, and forgotten. Shapes: i, o features.
"""

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mswift.errors import ConfigError, LayoutError
from mswift.parallel.four_bit import BLOCK, FourBits, Kind, PackedWeight, library, stand_for
from mswift.parallel.held_codes import CodesWeight, HeldCodes


class _Product(torch.autograd.Function):
    """Keeps no weight for the backward pass, but makes it again."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: FourBits, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        """x [..., i] -> [..., o]."""
        ctx.packed = packed
        return F.linear(x, packed.whole(), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        """Gradient of x."""
        return gradient @ ctx.packed.whole(), None, None


def pack_linears(
    layers: list[nn.Module],
    base: Kind | HeldCodes,
    device: torch.device,
    group: dist.ProcessGroup | None,
    sources: Mapping[Tensor, frozenset[str]],
) -> list[nn.Parameter]:
    """Let the linears of these layers, without memory yet, keep four bits a weight; their weights.

    group: ranks that share the rows; None: each keeps all of them. sources: the tensors of files that make each weight.
    LayoutError for rows that are no whole blocks, ConfigError where bitsandbytes is missing.
    """
    if not isinstance(base, HeldCodes):
        library()
    found = []
    for layer in layers:
        for name, module in layer.named_modules():
            if type(module) is not nn.Linear or ".lora_" in f".{name}.":
                continue
            if isinstance(base, HeldCodes) and not base.has(sources[module.weight], name):
                continue
            values = torch.empty_like(module.weight, device=device)
            weight = nn.Parameter(values, requires_grad=False)
            module.weight = weight
            _multiply_by(module, stand_for(weight, _packed(weight, base, name, group)))
            found.append(weight)
    if not found:
        raise ConfigError(
            "--quant_method: the model has no linears in its layers that it is for: use --backend megatron"
        )
    return found


def _packed(weight: nn.Parameter, base: Kind | HeldCodes, name: str, group: dist.ProcessGroup | None) -> FourBits:
    if isinstance(base, HeldCodes):
        return CodesWeight(weight, base, name, group)
    if weight.shape[1] % BLOCK:
        raise LayoutError(
            f"--quant_bits 4: {name} has {weight.shape[1]} inputs, which are no whole blocks of {BLOCK}: "
            "leave --quant_method out"
        )
    return PackedWeight(weight, base, group)


def _multiply_by(module: nn.Linear, packed: FourBits) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, packed, self.bias)  # type: ignore[no-untyped-call]
        return out

    module.forward = MethodType(forward, module)  # type: ignore[method-assign]
