"""Core attention on PyTorch's SDPA: flash kernels on GPU and CPU, no score matrix in memory, on one rank or several.

Shapes: s rows of this rank, n context-parallel ranks, b batch, h query heads, g KV heads (h a multiple of g), d head
dimension (v: of values). What crosses ranks, by `cp_comm_type`: p2p passes keys and values round a ring; all_gather
gathers them; a2a exchanges heads for rows (Jacobs et al. 2023, arXiv 2309.14509); a2a+p2p does so inside small groups
and has a ring between these.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mswift.parallel.attention.exchange import all_to_all
from mswift.parallel.attention.functions import Work, attention
from mswift.parallel.attention.kernels import Scores, has_flash
from mswift.parallel.attention.share import Share, natural_rows, rows_in_order, share_of


@dataclass(frozen=True)
class ContextGroups:
    """The ranks that share a sequence: rank and number; who exchanges heads with this rank, who keys and values."""

    rank: int = 0
    size: int = 1
    heads: ProcessGroup | None = None
    keys: ProcessGroup | None = None
    ring: bool = False

    @classmethod
    def of(cls, kind: str, groups: Any) -> "ContextGroups":
        """kind: a `cp_comm_type`; groups: megatron-core's collection, with `cp`, and `hcp` for a2a+p2p."""
        place = {"rank": groups.cp.rank(), "size": groups.cp.size()}
        match kind:
            case "p2p":
                return cls(**place, keys=groups.cp, ring=True)
            case "all_gather":
                return cls(**place, keys=groups.cp)
            case "a2a":
                return cls(**place, heads=groups.cp)
            case "a2a+p2p":
                return cls(**place, heads=groups.hcp[0], keys=groups.hcp[1], ring=True)
        raise ValueError(f"cp_comm_type {kind!r}")

    @property
    def owners(self) -> tuple[tuple[int, ...], ...]:
        """Context-parallel ranks whose rows each member of `keys` holds while heads are exchanged."""
        inner = self.heads.size() if self.heads else 1
        return tuple(tuple(range(first, first + inner)) for first in range(0, self.size, inner))


class SdpaAttention(nn.Module):
    """Causal self-attention with grouped KV heads, in the call form of megatron-core's core_attention.

    window: position t sees t - window + 1 .. t (None: all before it); softcap c: scores x become c * tanh(x / c).
    Where one rank has one document and neither changes anything, SDPA's own causal kernel computes it. A subclass may
    set `sinks` [h], logits that take part in the softmax and carry no value.
    """

    def __init__(
        self,
        config: Any,
        *,
        softmax_scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        pg_collection: Any = None,
        cp_comm_type: str | None = None,
        **_unused: object,
    ) -> None:
        super().__init__()
        self.scale, self.window, self.softcap = softmax_scale, window, softcap
        self.sinks: Tensor | None = None
        shared = config.context_parallel_size > 1
        self._groups = (
            ContextGroups.of(cp_comm_type or config.cp_comm_type, pg_collection) if shared else ContextGroups()
        )

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
        """query [s, b, h, d], key [s, b, g, d], value [s, b, g, v] -> [s, b, h * v]; position t sees positions 0..t.

        Packed documents (`mswift.parallel.megatron.documents`) come without b, and see each its own positions only.
        """
        if attention_mask is not None:
            raise NotImplementedError("SdpaAttention is causal; it takes no mask")
        if packed_seq_params is not None and query.dim() == 3:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        groups = self._groups
        share = share_of(query.shape[0], groups.rank, groups.size, packed_seq_params)
        if share is None or groups.heads is None:
            return self._attend(query, key, value, self.sinks, share).flatten(2)
        return self._with_exchanged_heads(query, key, value, share, groups.heads).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, share: Share | None) -> Tensor:
        """[s, b, h, v] of the queries of `share` (None: one whole document) to the keys of all ranks of `keys`."""
        s, scale = q.shape[0], self.scale or q.shape[-1] ** -0.5
        window = None if self.window is None or (share is None and s <= self.window) else self.window
        scores = Scores(scale, window, self.softcap)
        if self.softcap is None and sinks is None and (share is None or share.size == 1):
            if share is None and window is None and (q.is_cuda or q.shape[-1] == v.shape[-1]):
                return _causal(q, k, v, scale)
            if q.is_cuda and has_flash(q, v) and q.shape[-1] == v.shape[-1]:
                return _varlen(q, k, v, share.lengths if share else (s,), scale, window)
        groups = self._groups
        work = Work(share or Share((s,)), scores)
        if share is not None and share.size > 1 and groups.keys is not None:
            work = replace(work, group=groups.keys, ring=groups.ring, owners=groups.owners)
        return attention(q, k, v, sinks, work)

    def _with_exchanged_heads(self, q: Tensor, k: Tensor, v: Tensor, share: Share, group: ProcessGroup) -> Tensor:
        """The same, on the rows of all ranks of `group` and a part of the heads."""
        n, rank = group.size(), group.rank()
        first = self._groups.rank - rank
        widths = [x.shape[2] * x.shape[3] // n for x in (q, k, v)]
        parts = torch.cat([x.reshape(*x.shape[:2], n, -1) for x in (q, k, v)], dim=-1)
        rows = all_to_all(parts.permute(2, 0, 1, 3), group).flatten(0, 1)
        held = share.of(*range(first, first + n))
        whole = n == share.size
        if whole:
            rows = rows.index_select(0, rows_in_order(held, q.device))
        q, k, v = (
            part.unflatten(-1, (-1, x.shape[3])) for part, x in zip(rows.split(widths, -1), (q, k, v), strict=True)
        )
        sinks = None if self.sinks is None else self.sinks.view(n, -1)[rank]
        whole_share = Share(share.lengths) if len(share.lengths) > 1 else None
        out = self._attend(q, k, v, sinks, whole_share if whole else held).flatten(2)
        if whole:
            out = out.index_select(0, natural_rows(held, out.device))
        out = all_to_all(out.unflatten(0, (n, -1)), group).permute(1, 2, 0, 3)
        return out.reshape(*out.shape[:2], -1, v.shape[-1])


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """SDPA's own kernel: [s, b, h, v]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    many = k.shape[1] != q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=many)
    return out.permute(2, 0, 1, 3)


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int | None) -> Tensor:
    """One flash kernel over all documents of all b rows, on a GPU: [s, b, h, v]."""
    from torch.nn.attention.varlen import varlen_attn

    s, b = q.shape[:2]
    ends = torch.tensor(lengths * b).cumsum(0)
    bounds = F.pad(ends, (1, 0)).to(q.device, torch.int32)
    flat_q, flat_k, flat_v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
    size = (-1 if window is None else window - 1, 0)
    out = varlen_attn(
        flat_q, flat_k, flat_v, bounds, bounds, max(lengths), max(lengths), scale=scale, window_size=size,
        enable_gqa=k.shape[2] != q.shape[2],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.unflatten(0, (b, s)).transpose(0, 1)
