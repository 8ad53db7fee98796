"""The MLP's activations. Shapes: [..., f] -> [..., f]; gated: [..., 2 f], gate before up -> [..., f].

Each is made as megatron-core makes its own, `activation(config)`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mswift.converters.spec import ModelSpec


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
        of_activated = torch.mul(gradient, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(of_activated, gate, grad_input=grad_gate)
        return out


class Swiglu(nn.Module):
    """silu(gate) * up (Shazeer 2020) as one autograd step."""

    def __init__(self, config: object = None) -> None:
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        """Apply to the output of linear_fc1."""
        return _Swiglu.apply(gate_up)  # type: ignore[no-any-return, no-untyped-call]


class Gelu(nn.Module):
    """x * Phi(x) (Hendrycks and Gimpel 2016)."""

    approximate = "none"

    def __init__(self, config: object = None) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the output of linear_fc1."""
        return F.gelu(x, approximate=self.approximate)


class GeluTanh(Gelu):
    """Gelu with Phi approximated by tanh."""

    approximate = "tanh"


class Geglu(Gelu):
    """gelu(gate) * up (Shazeer 2020)."""

    def forward(self, gate_up: Tensor) -> Tensor:
        """Apply to the output of linear_fc1."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate=self.approximate) * up


class GegluTanh(Geglu):
    """Geglu with Phi approximated by tanh."""

    approximate = "tanh"


class SquaredRelu(nn.Module):
    """max(x, 0) ** 2 (So et al. 2021)."""

    def __init__(self, config: object = None) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the output of linear_fc1."""
        return F.relu(x).square()


class QuickGlu(nn.Module):
    """gate * sigmoid(1.702 gate) * (up + offset), gate and up clamped before: gate to at most `limit`, |up| too."""

    alpha = 1.702
    limit: float | None = None
    offset = 0.0

    def __init__(self, config: object = None) -> None:
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        """Apply to the output of linear_fc1."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + self.offset) * (gate * torch.sigmoid(gate * self.alpha))


ACTIVATIONS: dict[tuple[str, bool], type[nn.Module]] = {
    ("silu", True): Swiglu,
    ("gelu", True): Geglu,
    ("gelu_tanh", True): GegluTanh,
    ("gelu", False): Gelu,
    ("gelu_tanh", False): GeluTanh,
    ("relu2", False): SquaredRelu,
    ("quick_gelu", True): QuickGlu,
}
"""By (`ModelSpec.activation`, `ModelSpec.gated`): those that training computes."""


def activation_class(spec: ModelSpec) -> type[nn.Module]:
    """The activation of the model's MLPs."""
    kind = ACTIVATIONS[spec.activation, spec.gated]
    if kind is not QuickGlu:
        return kind
    return type("QuickGlu", (QuickGlu,), {"limit": spec.swiglu_limit, "offset": spec.glu_offset})
