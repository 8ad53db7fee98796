"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434) on megatron-core's linears and PyTorch's SDPA.

Modules carry megatron-core's names. megatron-core's own MLASelfAttention gives wrong gradients with tensor
parallelism unless its down-projections are Transformer Engine's and the sequence is parallel: the rotated key is
shared by all heads, so each rank has a partial sum of its gradient (0.16.1 and 0.19.2). Here that sum is made.

Shapes: s sequence (of this rank: s / tp under sequence parallelism), b batch, h heads of this rank, n, p, v the
head dimensions without position, with position and of values, c the width of the latent vector.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mswift.converters.spec import MlaSpec, ModelSpec
from mswift.parallel.attention.core import SdpaAttention
from mswift.parallel.attention.share import share_of
from mswift.parallel.megatron.linears import DuplicatedLinear
from mswift.parallel.norms import RMSNorm
from mswift.parallel.rotary import RotaryTable, rotate


class LatentSelfAttention(MegatronModule):
    """Causal self-attention whose queries (with q_lora_rank), keys and values pass through latent vectors."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        mla: MlaSpec,
        rotary: RotaryTable,
        softmax_scale: float,
        pg_collection: ProcessGroupCollection | None = None,
        cp_comm_type: str | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self._mla, self._rotary, self._group, self._context = mla, rotary, groups.tp, groups.cp
        heads, hidden, norm = config.num_attention_heads, config.hidden_size, {"config": config, "eps": mla.norm_eps}
        self._heads = heads // groups.tp.size()
        selective = config.recompute_granularity == "selective"
        self._recomputes = selective and "core_attn" in (config.recompute_modules or ())
        width = heads * mla.qk_head_dim
        if mla.q_lora_rank is None:
            self.linear_q_proj = _column(hidden, width, config, groups.tp)
        else:
            self.linear_q_down_proj = DuplicatedLinear(hidden, mla.q_lora_rank, config, groups.tp)
            self.q_layernorm = RMSNorm(hidden_size=mla.q_lora_rank, **norm)
            self.linear_q_up_proj = _column(mla.q_lora_rank, width, config, groups.tp)
        latent = mla.kv_lora_rank + mla.qk_rope_head_dim
        self.linear_kv_down_proj = DuplicatedLinear(hidden, latent, config, groups.tp)
        self.kv_layernorm = RMSNorm(hidden_size=mla.kv_lora_rank, **norm)
        up = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        self.linear_kv_up_proj = _column(mla.kv_lora_rank, up, config, groups.tp)
        self.core_attention = SdpaAttention(
            config, softmax_scale=softmax_scale, pg_collection=groups, cp_comm_type=cp_comm_type
        )
        self.linear_proj = RowParallelLinear(
            heads * mla.v_head_dim,
            hidden,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=groups.tp,
        )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
        """[s, b, hidden] -> ([s, b, hidden], no bias)."""
        packed = options.get("packed_seq_params")
        attend = partial(self.core_attention, attention_mask=attention_mask, packed_seq_params=packed)
        query, key, value = self._query_key_value(hidden_states, packed)
        mixed = checkpoint(attend, False, query, key, value) if self._recomputes else attend(query, key, value)
        out, _ = self.linear_proj(mixed)
        return out, None

    def _query_key_value(self, x: Tensor, packed: Any) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, hidden] -> query and key [s, b, h, n + p] and value [s, b, h, v] of the whole sequence."""
        mla = self._mla
        if mla.q_lora_rank is None:
            query, _ = self.linear_q_proj(x)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(x)[0]))
        latent, key_rotary = self.linear_kv_down_proj(x)[0].split([mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)
        up, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))
        query = query.unflatten(-1, (self._heads, mla.qk_head_dim))
        up = up.unflatten(-1, (self._heads, mla.qk_nope_head_dim + mla.v_head_dim))
        plain, turning = query.split([mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=-1)
        key, value = up.split([mla.qk_nope_head_dim, mla.v_head_dim], dim=-1)
        share = share_of(query.shape[0], self._context.rank(), self._context.size(), packed)
        cos, sin = self._rotary(share or query.shape[0], query.dtype)
        pairs = self._rotary.interleaved
        query = torch.cat((plain, rotate(turning, cos, sin, interleaved=pairs)), dim=-1)
        shared = rotate(self._of_all_heads(key_rotary).unsqueeze(-2), cos, sin, interleaved=pairs)
        return query, torch.cat((key, shared.expand(-1, -1, self._heads, -1)), dim=-1), value

    def _of_all_heads(self, key: Tensor) -> Tensor:
        """[s, b, p] -> of the whole sequence; its gradient is summed over the ranks, which have other heads."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(key, group=self._group)  # type: ignore[no-any-return]
        return copy_to_tensor_model_parallel_region(key, group=self._group)  # type: ignore[no-any-return]


def _column(in_features: int, out_features: int, config: TransformerConfig, group: Any) -> ColumnParallelLinear:
    return ColumnParallelLinear(
        in_features,
        out_features,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        skip_bias_add=False,
        tp_group=group,
    )


def latent_attention_spec(spec: ModelSpec, rotary: RotaryTable | None) -> ModuleSpec:
    """Attention of a layer of a model with `ModelSpec.mla`."""
    assert spec.mla is not None
    assert rotary is not None
    scale = spec.attention_scale or spec.mla.qk_head_dim**-0.5
    params = {"mla": spec.mla, "rotary": rotary, "softmax_scale": scale, "attn_mask_type": AttnMaskType.causal}
    return ModuleSpec(module=LatentSelfAttention, params=params)
