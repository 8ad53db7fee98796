"""The layers of a decoder for megatron-core, put together from the parts beside this file.

What a model needs and no part computes is refused here, by the name of the field.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from mswift.converters.spec import LayerSpec, ModelSpec
from mswift.errors import ConfigError
from mswift.parallel.megatron.mlp import dense_mlp_spec
from mswift.parallel.megatron.self_attention import self_attention_spec
from mswift.parallel.norms import RMSNorm
from mswift.parallel.rotary import RotaryTable

COMPUTED: dict[str, tuple[Any, ...]] = {
    "activation": ("silu",),
    "gated": (True,),
    "norm": ("rms",),
    "zero_centered_norm": (False,),
    "pre_norm": (True,),
    "post_norm": (False,),
    "qk_norm": ("none", "head"),
    "attention_scale": (None,),
    "attention_softcap": (None,),
    "attention_sinks": (False,),
    "attention_gate": (False,),
    "swiglu_limit": (None,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logit_divisor": (1.0,),
    "logit_softcap": (None,),
    "mtp_layers": ((),),
    "moe": (None,),
    "mla": (None,),
    "mamba": (None,),
    "delta": (None,),
}
"""Fields of ModelSpec and the values with which training computes the model's function."""


def check_computed(spec: ModelSpec) -> None:
    """ConfigError for the first feature of the model that training does not compute; its conversion is not affected."""
    for name, values in COMPUTED.items():
        if getattr(spec, name) not in values:
            raise ConfigError(
                f"model_type {spec.model_type!r}: training does not compute {name} {getattr(spec, name)!r} yet; "
                "the model can be converted"
            )
    if any(layer.window is not None for layer in spec.layers):
        raise ConfigError(f"model_type {spec.model_type!r}: training does not compute sliding windows yet")


def add_residual(_training: bool, _fused: bool) -> Any:
    """What megatron-core calls bias-dropout-add, without dropout: residual + (x + bias)."""

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, _probability: float) -> Tensor:
        x, bias = x_with_bias
        return residual + (x if bias is None else x + bias)

    return add


def layer_spec(spec: ModelSpec, layer: LayerSpec, rotary: Sequence[RotaryTable]) -> ModuleSpec:
    """One decoder layer."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=self_attention_spec(spec, layer, None if layer.rope is None else rotary[layer.rope]),
            self_attn_bda=add_residual,
            pre_mlp_layernorm=RMSNorm,
            mlp=dense_mlp_spec(spec),
            mlp_bda=add_residual,
            cross_attention=IdentityOp,
        ),
    )


def block_spec(spec: ModelSpec, layers: range, rotary: Sequence[RotaryTable]) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the norm behind the last of them."""
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(spec, spec.layer(n), rotary) for n in layers], layer_norm=RMSNorm
    )


def rotary_tables(spec: ModelSpec, device: torch.device) -> list[RotaryTable]:
    """One for each of `spec.ropes`; all layers of one rank share them."""
    return [RotaryTable(rope, spec.head_dim, device) for rope in spec.ropes]
