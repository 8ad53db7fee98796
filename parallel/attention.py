"""Core attention on PyTorch's SDPA: flash kernels on GPU and CPU, no score matrix in memory.

Shapes: s sequence, b batch, h query heads, g KV heads (h a multiple of g), d head dimension (v: of values).
"""

import torch.nn.functional as F
from torch import Tensor, nn


class SdpaAttention(nn.Module):
    """Causal self-attention with grouped KV heads, in the call form of megatron-core's core_attention."""

    def __init__(self, config: object, *, softmax_scale: float | None = None, **_unused: object) -> None:
        super().__init__()
        if config.context_parallel_size > 1:  # type: ignore[attr-defined]
            raise NotImplementedError("SdpaAttention does not share a sequence between ranks (context parallelism)")
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: object | None = None,
        **_unused: object,
    ) -> Tensor:
        """query [s, b, h, d], key [s, b, g, d], value [s, b, g, v] -> [s, b, h * v]; position t sees positions 0..t."""
        if attention_mask is not None or packed_seq_params is not None:
            raise NotImplementedError("SdpaAttention is causal; it takes neither a mask nor packed sequences")
        s, b, h = query.shape[:3]
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            scale=self.scale,
            enable_gqa=key.shape[2] != h,
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, -1)
