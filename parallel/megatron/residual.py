"""The additions to the residual stream (megatron-core's "bias-dropout-add", without dropout)."""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mswift.converters.spec import ModelSpec
from mswift.parallel.norms import norm_class

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


def add_residual(_training: bool, _fused: bool) -> Add:
    """residual + (x + bias)."""

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, _probability: float) -> Tensor:
        x, bias = x_with_bias
        return residual + (x if bias is None else x + bias)

    return add


class NormedResidual(nn.Module):
    """residual + multiplier * norm(x + bias); the norm is there if the model has norms behind its sublayers.

    The norm stands here, not inside the linear before it, so that an adapter of that linear comes before the norm.
    """

    def __init__(self, config: TransformerConfig, spec: ModelSpec) -> None:
        super().__init__()
        self.multiplier = spec.residual_multiplier
        if spec.post_norm:
            self.post_layernorm = norm_class(spec)(config, spec.hidden_size, spec.norm_eps)

    def forward(self, _training: bool, _fused: bool) -> Add:
        """The function that megatron-core calls."""
        return self._add

    def _add(self, x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, _probability: float) -> Tensor:
        x, bias = x_with_bias
        x = x if bias is None else x + bias
        if hasattr(self, "post_layernorm"):
            x = self.post_layernorm(x)
        return residual + (x if self.multiplier == 1.0 else x * self.multiplier)


def residual_spec(spec: ModelSpec, config: TransformerConfig) -> Any:
    """For `self_attn_bda` and `mlp_bda` of a layer."""
    if not spec.post_norm and spec.residual_multiplier == 1.0:
        return add_residual
    return ModuleSpec(module=NormedResidual, params={"config": config, "spec": spec})
