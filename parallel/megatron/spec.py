"""The layers of a dense decoder for megatron-core, on PyTorch alone (no Transformer Engine, no apex).

Shapes: s sequence, b batch, g KV groups of this rank, r query heads per group, d head dimension, f ffn columns.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from mswift.converters.spec import ModelSpec
from mswift.parallel.activations import Swiglu
from mswift.parallel.attention import SdpaAttention
from mswift.parallel.norms import RMSNorm
from mswift.parallel.rotary import RotaryTable, rotate


class BiasedColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel linear with a bias, whatever megatron-core's single `add_bias_linear` says."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class BiasedRowParallelLinear(RowParallelLinear):
    """A row-parallel linear with a bias, whatever megatron-core's single `add_bias_linear` says."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class RotarySelfAttention(SelfAttention):
    """megatron-core's self-attention; q and k are rotated with a table that all layers share."""

    def __init__(self, *args: Any, rotary: RotaryTable, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rotary = rotary

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, hidden] -> rotated query [s, b, g * r, d], rotated key [s, b, g, d], value [s, b, g, d]."""
        mixed, _ = self.linear_qkv(hidden_states)
        groups, head_dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        s, b, width = mixed.shape
        heads = width // (groups * head_dim)
        query, key, value = mixed.view(s, b, groups, heads, head_dim).split([heads - 2, 1, 1], dim=-2)
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        cos, sin = (part.unsqueeze(-2) for part in self._rotary(s, mixed.dtype))
        return rotate(query, cos, sin).flatten(2, 3), rotate(key, cos, sin).flatten(2, 3), value.squeeze(-2)


def add_residual(_training: bool, _fused: bool) -> Any:
    """What megatron-core calls bias-dropout-add, without dropout: residual + (x + bias)."""

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, _probability: float) -> Tensor:
        x, bias = x_with_bias
        return residual + (x if bias is None else x + bias)

    return add


def layer_spec(spec: ModelSpec, rotary: RotaryTable) -> ModuleSpec:
    """One decoder layer."""
    qk_norm = RMSNorm if spec.qk_norm else None
    column = BiasedColumnParallelLinear if spec.mlp_bias else ColumnParallelLinear
    row = BiasedRowParallelLinear if spec.mlp_bias else RowParallelLinear
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=SdpaAttention,
        linear_proj=BiasedRowParallelLinear if spec.attention_out_bias else RowParallelLinear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=RotarySelfAttention,
                params={"attn_mask_type": AttnMaskType.causal, "rotary": rotary},
                submodules=attention,
            ),
            self_attn_bda=add_residual,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(column, Swiglu, row)),
            mlp_bda=add_residual,
            cross_attention=IdentityOp,
        ),
    )


def block_spec(spec: ModelSpec, num_layers: int, rotary: RotaryTable) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the norm behind the last of them."""
    return TransformerBlockSubmodules(layer_specs=[layer_spec(spec, rotary)] * num_layers, layer_norm=RMSNorm)


def rotary_table(spec: ModelSpec, device: torch.device) -> RotaryTable:
    """The table that all layers of one rank share."""
    return RotaryTable(spec.rope, spec.head_dim, device)
