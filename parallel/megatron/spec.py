"""The layers of a decoder for megatron-core, put together from the parts beside this file.

What a model needs and no part computes is refused here, by the name of the field.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mswift.converters.spec import LayerSpec, ModelSpec
from mswift.errors import ConfigError
from mswift.parallel.activations import ACTIVATIONS
from mswift.parallel.megatron.delta import delta_net_spec
from mswift.parallel.megatron.mamba import mamba_mixer_spec
from mswift.parallel.megatron.mla import latent_attention_spec
from mswift.parallel.megatron.mlp import dense_mlp_spec
from mswift.parallel.megatron.moe import moe_mlp_spec
from mswift.parallel.megatron.residual import residual_spec
from mswift.parallel.megatron.self_attention import self_attention_spec
from mswift.parallel.norms import norm_class
from mswift.parallel.rotary import RotaryTable

COMPUTED: dict[str, tuple[Any, ...]] = {
    "dropout": (0.0,),
    "mtp_layers": ((),),
}
"""Fields of ModelSpec and the values with which training computes the model's function."""

REMEDIES = {
    "dropout": ", and trained without dropout once its config.json says 0",
    "mtp_layers": ", and trained without these layers once their tensors are left out, as transformers' "
    "save_pretrained does",
}


def check_computed(spec: ModelSpec) -> None:
    """ConfigError for the first feature of the model that training does not compute; its conversion is not affected."""
    for name, values in COMPUTED.items():
        if getattr(spec, name) not in values:
            raise ConfigError(
                f"model_type {spec.model_type!r}: training does not compute {name} {getattr(spec, name)!r} yet; "
                f"the model can be converted{REMEDIES.get(name, '')}"
            )
    if spec.swiglu_limit is not None and spec.activation != "quick_gelu":
        raise ConfigError(
            f"model_type {spec.model_type!r}: training does not compute swiglu_limit {spec.swiglu_limit} of "
            f"activation {spec.activation!r} yet; the model can be converted"
        )
    if (spec.activation, spec.gated) not in ACTIVATIONS:
        kind = "gated" if spec.gated else "without a gate"
        raise ConfigError(
            f"model_type {spec.model_type!r}: training does not compute activation {spec.activation!r} {kind} yet; "
            "the model can be converted"
        )


def layer_spec(
    spec: ModelSpec, layer: LayerSpec, rotary: Sequence[RotaryTable], config: TransformerConfig
) -> ModuleSpec:
    """One decoder layer; without a mixer, or without an MLP, nothing is in its place."""
    norm = norm_class(spec) if spec.pre_norm else IdentityOp
    table = None if layer.rope is None else rotary[layer.rope]
    parts: dict[str, Any] = {}
    if layer.mixer != "none":
        parts |= {"input_layernorm": norm, "self_attn_bda": residual_spec(spec, config)}
        parts["self_attention"] = _mixer_spec(spec, layer, table)
    if layer.mlp != "none":
        parts |= {"pre_mlp_layernorm": norm, "mlp_bda": residual_spec(spec, config)}
        parts["mlp"] = moe_mlp_spec(spec) if layer.mlp == "moe" else dense_mlp_spec(spec)
    return ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(**parts))


def _mixer_spec(spec: ModelSpec, layer: LayerSpec, rotary: RotaryTable | None) -> ModuleSpec:
    if layer.mixer == "mamba":
        assert spec.mamba is not None
        return mamba_mixer_spec(spec.mamba)
    if layer.mixer == "delta":
        assert spec.delta is not None
        return delta_net_spec(spec.delta)
    return self_attention_spec(spec, layer, rotary) if spec.mla is None else latent_attention_spec(spec, rotary)


def block_spec(
    spec: ModelSpec, layers: range, rotary: Sequence[RotaryTable], config: TransformerConfig
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the norm behind the last of them."""
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(spec, spec.layer(n), rotary, config) for n in layers], layer_norm=norm_class(spec)
    )


def rotary_tables(spec: ModelSpec, device: torch.device) -> list[RotaryTable]:
    """One for each of `spec.ropes`; all layers of one rank share them."""
    width = spec.head_dim if spec.mla is None else spec.mla.qk_rope_head_dim
    return [RotaryTable(rope, width, device) for rope in spec.ropes]
