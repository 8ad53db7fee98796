"""Linears of a transformers model on four bits a weight: whole on every rank, or their rows cut over ranks.

Blocks of codes with one scale lie in a row, so that a row's codes are those that it has in the whole weight. Codes and
scales of cut ones are gathered as they are used, once forward, once backward, and forgotten. Shapes: i, o features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mswift.errors import ConfigError, LayoutError
from mswift.parallel.four_bit import BLOCK, Kind, PackedWeight, library, pack, stand_for


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


class PackedRows(PackedWeight):
    """A frozen weight [o, i] whose rows are cut over the ranks of a group: the first `count` from `first` are here."""

    def __init__(self, parameter: nn.Parameter, kind: Kind, group: dist.ProcessGroup) -> None:
        super().__init__(parameter, kind)
        self._group, rows = group, parameter.shape[0]
        self._padded = -(-rows // group.size())
        self.first = min(self._padded * group.rank(), rows)
        self.count = min(self._padded, rows - self.first)

    @property
    def elements(self) -> int:
        """Of this rank's rows."""
        return self.count * self._parameter.shape[1]

    @contextmanager
    def filled(self) -> Iterator[Tensor]:
        """Memory [count, i] to read this rank's rows into; at the end they become four bits each."""
        values = self._parameter.new_zeros(self._padded, self._parameter.shape[1])
        yield values[: self.count]
        self._keep(values)

    def whole(self) -> Tensor:
        """[o, i] in the dtype of the model; to be called by all ranks of the group."""
        if self._codes is None:
            raise RuntimeError("a 4-bit weight is used before it was read")
        rows, inputs = self._parameter.shape
        state = copy(self._state)
        state.absmax, state.shape = self._gathered(self._state.absmax)[: rows * inputs // BLOCK], self._parameter.shape
        codes = self._gathered(self._codes)[: rows * inputs // 2]
        values: Tensor = library().dequantize_4bit(codes, state)
        return values

    def _gathered(self, mine: Tensor) -> Tensor:
        """That of all ranks, one behind the other."""
        every = mine.new_empty(self._group.size() * len(mine), *mine.shape[1:])
        dist.all_gather_into_tensor(every, mine, group=self._group)
        return every


def pack_linears(
    layers: list[nn.Module], kind: Kind, device: torch.device, group: dist.ProcessGroup | None
) -> list[nn.Parameter]:
    """Let the linears of these layers, without memory yet, keep four bits a weight; their weights.

    group: ranks that share the rows; None: each keeps all of them.
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
            rows = None if group is None else stand_for(module.weight, PackedRows(module.weight, kind, group))
            _multiply_by(module, rows or pack(module.weight, kind))
            found.append(module.weight)
    if not found:
        raise ConfigError("--quant_method bnb: the model has no linears in its layers: use --backend megatron")
    return found


def _multiply_by(module: nn.Linear, packed: PackedWeight) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, packed, self.bias)  # type: ignore[no-untyped-call]
        return out

    module.forward = MethodType(forward, module)  # type: ignore[method-assign]
