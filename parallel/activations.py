"""SwiGLU as one autograd step. Shapes: [..., 2 f] with gate in the first half, up in the second."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=grad_gate)
        return out


class Swiglu(nn.Module):
    """silu(gate) * up: [..., 2 f] -> [..., f] (Shazeer 2020), in the call form of megatron-core's activations."""

    def __init__(self, config: object = None) -> None:
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        """Apply to the output of linear_fc1."""
        return _Swiglu.apply(gate_up)  # type: ignore[no-any-return, no-untyped-call]
