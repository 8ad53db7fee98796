"""A gated delta net in the place of self-attention, for megatron-core, on PyTorch alone.

megatron-core's own needs flash-linear-attention. This one has its parameters, laid out alike, but for the norm of the
output, whose weight is w and not 1 + w as megatron-core has it in models with zero-centred norms. Heads are cut over
tensor-parallel ranks. Shapes: s sequence, b batch, g key heads, r value heads a key head, d key and p value dimension.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mswift.converters.spec import DeltaSpec
from mswift.parallel.delta_rule import gated_delta_rule, unit_length
from mswift.parallel.megatron.mamba import (
    ChannelKernels,
    check_whole_sequence,
    column_linear,
    cut_vector,
    recomputed,
    row_linear,
)


class HeadNormGated(nn.Module):
    """RMSNorm of each head, then times silu(z). Every rank has the weight and a part of the heads."""

    def __init__(self, config: TransformerConfig, head_dim: int, group: ProcessGroup) -> None:
        super().__init__()
        self.eps, self._group = config.layernorm_epsilon, group
        self.weight = nn.Parameter(torch.empty(head_dim, dtype=config.params_dtype, device=torch.cuda.current_device()))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x fp32 and z [..., p] -> the same shape in z's dtype."""
        weight = copy_to_tensor_model_parallel_region(self.weight, group=self._group)
        normed = F.rms_norm(x, (x.shape[-1],), None, self.eps).to(z.dtype)
        return (weight * normed * F.silu(z.float())).to(z.dtype)


class GatedDeltaNet(nn.Module):
    """Gated delta net (Yang et al. 2024) as in Qwen3-Next; called as megatron-core calls self-attention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        delta: DeltaSpec,
        pg_collection: ProcessGroupCollection,
        **_unused: object,
    ) -> None:
        super().__init__()
        check_whole_sequence(config)
        group = pg_collection.tp
        tp, heads = group.size(), delta.num_value_heads
        keys, values = delta.num_key_heads * delta.key_head_dim, heads * delta.value_head_dim
        self.config, self._delta, self._groups = config, delta, delta.num_key_heads // tp
        self._sizes = [size // tp for size in (keys, keys, values, values, heads, heads)]
        self.in_proj = column_linear(config, 2 * keys + 2 * values + 2 * heads, group)
        self.conv1d = ChannelKernels(config, sum(self._sizes[:3]), delta.conv_kernel, bias=False)
        self.A_log, self.dt_bias = (cut_vector(config, self._sizes[4]) for _ in range(2))
        self.out_norm = HeadNormGated(config, delta.value_head_dim, group)
        self.out_proj = row_linear(config, values, group)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """[s (of this rank under sequence parallelism), b, hidden] -> (the same, None)."""
        check_whole_sequence(self.config, attention_mask, **options)
        projected, _ = self.in_proj(hidden_states)
        qkv, rest = projected.split([sum(self._sizes[:3]), sum(self._sizes[3:])], dim=-1)
        z, beta, alpha = rest.transpose(0, 1).split(self._sizes[3:], dim=-1)
        value_heads = (self._groups, -1, self._delta.value_head_dim)
        y = self._rule(self.conv1d(qkv), beta.unflatten(-1, value_heads[:2]), alpha)
        y = self.out_norm(y, z.unflatten(-1, value_heads)).flatten(2)
        return self.out_proj(y.transpose(0, 1).contiguous())

    def _rule(self, qkv: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
        """qkv [b, s, 2 g d + g r p], beta [b, s, g, r], alpha [b, s, g r] -> [b, s, g, r, p] fp32."""
        q, k, v = qkv.split(self._sizes[:3], dim=-1)
        q, k = (unit_length(x.unflatten(-1, (self._groups, -1)).float()) for x in (q, k))
        log_decay = -self.A_log.float().exp() * F.softplus(alpha.float() + self.dt_bias.float())
        return recomputed(
            gated_delta_rule,
            q,
            k,
            v.unflatten(-1, (self._groups, -1, self._delta.value_head_dim)).float(),
            log_decay.unflatten(-1, (self._groups, -1)),
            beta.float().sigmoid(),
        )


def delta_net_spec(delta: DeltaSpec) -> ModuleSpec:
    """The mixer of a layer."""
    return ModuleSpec(module=GatedDeltaNet, params={"delta": delta})
