"""Self-attention of a decoder layer for megatron-core, on PyTorch alone (no Transformer Engine, no apex).

Shapes: s sequence, b batch, g KV groups of this rank, r query heads per group, d head dimension.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from mswift.converters.spec import LayerSpec, ModelSpec
from mswift.parallel.attention.core import SdpaAttention
from mswift.parallel.attention.share import share_of
from mswift.parallel.megatron.linears import BiasedRowParallelLinear
from mswift.parallel.megatron.width_norm import WidthRMSNorm
from mswift.parallel.norms import norm_class
from mswift.parallel.rotary import RotaryTable, rotate


class SinkAttention(SdpaAttention):
    """Attention with a learnt logit for each head of this rank, `softmax_offset` [h] as megatron-core names it."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        sinks = torch.empty(heads, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.softmax_offset = nn.Parameter(sinks)
        set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `SdpaAttention`."""
        self.sinks = self.softmax_offset
        return super().forward(*args, **kwargs)


class RotarySelfAttention(SelfAttention):
    """megatron-core's self-attention; q and k are rotated with a table that all layers share."""

    def __init__(self, *args: Any, rotary: RotaryTable | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rotary = rotary
        self._packed: Any = None

    def forward(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """As megatron-core's."""
        self._packed = packed_seq_params  # what rotates q and k is not told
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, ...]:
        """[s, b, hidden] -> rotated query [s, b, g * r, d], rotated key [s, b, g, d], value [s, b, g, d].

        With output_gate also the gate [s, b, g * r, d]; a group's rows are then query, gate, key, value.
        """
        mixed, _ = self.linear_qkv(hidden_states)
        groups, head_dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        s, b, width = mixed.shape
        heads = width // (groups * head_dim)
        queries = [(heads - 2) // 2] * 2 if output_gate else [heads - 2]
        query, *gate, key, value = mixed.view(s, b, groups, heads, head_dim).split([*queries, 1, 1], dim=-2)
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if self._rotary is not None:
            context = self.pg_collection.cp
            share = share_of(s, context.rank(), context.size(), self._packed)
            cos, sin = (part.unsqueeze(-2) for part in self._rotary(share or s, mixed.dtype))
            query, key = (rotate(x, cos, sin, interleaved=self._rotary.interleaved) for x in (query, key))
        return query.flatten(2, 3), key.flatten(2, 3), value.squeeze(-2), *(part.flatten(2, 3) for part in gate)


def self_attention_spec(spec: ModelSpec, layer: LayerSpec, rotary: RotaryTable | None) -> ModuleSpec:
    """Attention with grouped KV heads."""
    q_norm, k_norm = _qk_norms(spec)
    attention: Any = SdpaAttention
    if spec.attention_sinks or layer.window is not None or spec.attention_softcap is not None:
        kind = SinkAttention if spec.attention_sinks else SdpaAttention
        attention = partial(kind, window=layer.window, softcap=spec.attention_softcap)
    return ModuleSpec(
        module=RotarySelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "rotary": rotary},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=attention,
            linear_proj=BiasedRowParallelLinear if spec.attention_out_bias else RowParallelLinear,
            q_layernorm=q_norm,
            k_layernorm=k_norm,
        ),
    )


def _qk_norms(spec: ModelSpec) -> tuple[Any, Any]:
    """The norms of queries and keys: none, over each head, or over all heads."""
    if spec.qk_norm == "head":
        return norm_class(spec), norm_class(spec)
    if spec.qk_norm == "none":
        return None, None
    q, k = (
        ModuleSpec(module=WidthRMSNorm, params={"num_heads": n}) for n in (spec.num_attention_heads, spec.num_kv_heads)
    )
    return q, k
