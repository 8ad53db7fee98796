"""Linears of a model on a CPU with their weights in oneDNN's blocks, as vLLM's CPU build keeps them.

MKL packs a weight anew for every product. For 4 to 16 rows, which is what a batch of answers is, oneDNN's product of a
weight that is packed once takes 0.45 to 0.7 of the time in float32, and 0.6 in bfloat16 (one thread of an AMD EPYC).
"""

# Shapes: I in, O out features.

from typing import Any

import torch
from torch import nn

ROWS = 16
"""The blocks are chosen for products of so many rows; others are as right."""


class PackedLinear(nn.Linear):
    """Has no parameter `weight` any more; who reads it gets a copy."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._dtype = linear.weight.dtype
        self._packed: Any = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """[O, I], unpacked."""
        return self._packed.to_dense()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        if input.dtype != self._dtype:
            raise RuntimeError(f"input of {input.dtype} for a weight of {self._dtype}")
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, "none", [], "")
        return product


def pack_linears(model: nn.Module) -> int:
    """Pack the linears of a model in its place, where that is of use; returns how many.

    A weight that has another name as well (a tied head) stays, or there would be two of it.
    """
    kinds = _packed_dtypes()
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter.data_ptr()] = owners.get(parameter.data_ptr(), 0) + 1
    packed: dict[nn.Module, PackedLinear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is not nn.Linear or module.weight.device.type != "cpu" or module.weight.dtype not in kinds:
            continue
        if module not in packed and owners[module.weight.data_ptr()] == 1:
            packed[module] = PackedLinear(module)
        if module in packed:
            model.set_submodule(name, packed[module])
    if packed:
        _leave_files(model)
    return len(packed)


def _leave_files(model: nn.Module) -> None:
    """Copy what is not packed: while one tensor is a part of a mapped file, all that was read of it stays in memory."""
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    for parameter in model.parameters():
        place = (parameter.data_ptr(), parameter.shape, parameter.stride())
        if place not in copies:
            copies[place] = parameter.data.clone()
        parameter.data = copies[place]


def _packed_dtypes() -> tuple[torch.dtype, ...]:
    """What oneDNN computes in on this machine."""
    if not torch.backends.mkldnn.is_available():
        return ()
    has_bfloat16: Any = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return (torch.float32, torch.bfloat16) if has_bfloat16() else (torch.float32,)
