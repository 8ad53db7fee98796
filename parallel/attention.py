"""Core attention on PyTorch's SDPA: flash kernels on GPU and CPU, no score matrix in memory.

Shapes: s sequence, b batch, h query heads, g KV heads (h a multiple of g), d head dimension (v: of values);
t queries and u keys of a block.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BLOCK = 1024
"""Queries that are worked on at once where scores are masked: no mask or score matrix is larger than BLOCK * s."""


class SdpaAttention(nn.Module):
    """Causal self-attention with grouped KV heads, in the call form of megatron-core's core_attention.

    window: position t sees t - window + 1 .. t (None: all before it); softcap c: scores x become c * tanh(x / c).
    Where neither changes anything, SDPA's own causal kernel computes it. A subclass may set `sinks` [h], logits that
    take part in the softmax and carry no value.
    """

    def __init__(
        self,
        config: object,
        *,
        softmax_scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        **_unused: object,
    ) -> None:
        super().__init__()
        if config.context_parallel_size > 1:  # type: ignore[attr-defined]
            raise NotImplementedError("SdpaAttention does not share a sequence between ranks (context parallelism)")
        self.scale, self.window, self.softcap = softmax_scale, window, softcap
        self.sinks: Tensor | None = None

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
        windowed = self.window is not None and s > self.window
        if windowed or self.softcap is not None or self.sinks is not None:
            out = self._in_blocks(q, k, v)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                is_causal=True,
                scale=self.scale,
                enable_gqa=key.shape[2] != h,
            )
        return out.permute(2, 0, 1, 3).reshape(s, b, -1)

    def _in_blocks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Blocks of queries, each with the keys that it may see: [b, h, s, d].

        Several blocks of explicit scores are computed again in the backward pass: their sum would be s * s / 2.
        """
        s = q.shape[2]
        explicit = self.softcap is not None or self.sinks is not None
        attend = partial(_explicit, softcap=self.softcap) if explicit else _masked
        again = explicit and s > BLOCK and torch.is_grad_enabled()
        outs = []
        for first in range(0, s, BLOCK):
            stop = min(first + BLOCK, s)
            start = 0 if self.window is None else max(0, first - self.window + 1)
            block = (q[:, :, first:stop], k[:, :, start:stop], v[:, :, start:stop])
            mask = visible(stop - first, stop - start, self.window, q.device)
            arguments = (*block, mask, self.scale, self.sinks)
            if again:
                outs.append(checkpoint(attend, *arguments, use_reentrant=False, preserve_rng_state=False))
            else:
                outs.append(attend(*arguments))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[t, u] bool: which keys the last t of u positions see."""
    behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, _sinks: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1])


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, sinks: Tensor | None, *, softcap: float | None
) -> Tensor:
    """Attention with its scores written out: q [b, h, t, d], k and v [b, g, u, d], mask [t, u] -> [b, h, t, d].

    The softmax is taken in fp32.
    """
    b, h, t, d = q.shape
    groups = k.shape[1]
    scores = q.reshape(b, groups, h // groups, t, d) @ k.unsqueeze(2).transpose(-1, -2)
    scores = scores * (d**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(groups, -1, 1, 1).expand(b, -1, -1, t, 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return (weights @ v.unsqueeze(2)).flatten(1, 2)
