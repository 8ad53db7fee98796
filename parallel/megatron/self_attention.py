"""Self-attention of a decoder layer for megatron-core, on PyTorch alone (no Transformer Engine, no apex).

Shapes: s sequence, b batch, g KV groups of this rank, r query heads per group, d head dimension.
"""

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from mswift.converters.spec import LayerSpec, ModelSpec
from mswift.parallel.attention import SdpaAttention
from mswift.parallel.megatron.linears import BiasedRowParallelLinear
from mswift.parallel.norms import RMSNorm
from mswift.parallel.rotary import RotaryTable, rotate


class RotarySelfAttention(SelfAttention):
    """megatron-core's self-attention; q and k are rotated with a table that all layers share."""

    def __init__(self, *args: Any, rotary: RotaryTable | None, **kwargs: Any) -> None:
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
        if self._rotary is not None:
            cos, sin = (part.unsqueeze(-2) for part in self._rotary(s, mixed.dtype))
            query, key = (rotate(x, cos, sin, interleaved=self._rotary.interleaved) for x in (query, key))
        return query.flatten(2, 3), key.flatten(2, 3), value.squeeze(-2)


def self_attention_spec(spec: ModelSpec, layer: LayerSpec, rotary: RotaryTable | None) -> ModuleSpec:
    """Attention with grouped KV heads."""
    qk_norm = RMSNorm if spec.qk_norm == "head" else None
    return ModuleSpec(
        module=RotarySelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "rotary": rotary},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SdpaAttention,
            linear_proj=BiasedRowParallelLinear if spec.attention_out_bias else RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
