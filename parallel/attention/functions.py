"""Attention of a rank's queries to the keys of every rank, as autograd steps that keep this rank's rows only.

Keys and values of other ranks are fetched once more in the backward pass. Shapes: s rows of this rank, n ranks,
b batch, h query heads, g KV heads, d head dimension of queries and keys, v of values; [rows, batch, heads, dimension].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mswift.parallel.attention.exchange import Passing, gather_rows, pass_on, sum_rows
from mswift.parallel.attention.kernels import Scores
from mswift.parallel.attention.share import Segment, Share, natural_rows, rows_in_order, segments
from mswift.parallel.attention.softmax import Merged, Softmax
from mswift.parallel.attention.tiles import Tile, tiles


@dataclass(frozen=True)
class Work:
    """What one rank computes: its own rows, how scores come about, and who has the other keys.

    With a `group`, `owners[i]` are the context-parallel ranks whose rows rank i of it holds. ring: keys are passed on
    from rank to rank; else they are gathered. Without: the keys are the rank's own.
    """

    share: Share
    scores: Scores
    group: ProcessGroup | None = None
    ring: bool = False
    owners: tuple[tuple[int, ...], ...] = ()

    @property
    def num_steps(self) -> int:
        """How often keys are passed on, the rank's own included."""
        return len(self.owners) if self.ring else 1

    def keys_of_step(self, step: int) -> tuple[Segment, ...]:
        """The keys that are here in a step."""
        if self.group is None:
            return segments(self.share)
        if not self.ring:
            return segments(Share(self.share.lengths))
        return segments(self.share.of(*self.owners[(self.group.rank() - step) % len(self.owners)]))

    def tiles_of_step(self, step: int, block: int | None) -> tuple[Tile, ...]:
        """What this rank computes in a step."""
        return tiles(segments(self.share), self.keys_of_step(step), self.scores.window, block)

    @property
    def everyone(self) -> Share:
        """The rows of the group, one rank's after the other's."""
        return self.share.of(*(rank for ranks in self.owners for rank in ranks))

    def keys(self, packed: Tensor) -> Iterator[Tensor]:
        """Keys and values [rows, b, g, d + v] of one step after the other; the next are on their way meanwhile."""
        if self.group is None:
            yield packed
        elif not self.ring:
            gathered = gather_rows(packed, self.group)
            yield gathered.index_select(0, rows_in_order(self.everyone, packed.device))
        else:
            for step in range(self.num_steps):
                coming = pass_on(packed, self.group) if step + 1 < self.num_steps else None
                yield packed
                packed = coming.wait() if coming else packed


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, work: Work) -> Tensor:
        query = q.permute(1, 2, 0, 3)
        merged, block = Merged(query, v.shape[-1], work.scores), work.scores.block(q, v)
        for step, packed in enumerate(work.keys(torch.cat((k, v), dim=-1))):
            key, value = packed.permute(1, 2, 0, 3).split((k.shape[-1], v.shape[-1]), dim=-1)
            merged.add(key, value, work.tiles_of_step(step, block))
        if sinks is not None:
            merged.add_sinks(sinks)
        out = merged.out.to(q.dtype).permute(2, 0, 1, 3).contiguous()
        ctx.save_for_backward(q, k, v, sinks, out, merged.lse)
        ctx.work = work
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, sinks, out, lse = ctx.saved_tensors
        work: Work = ctx.work
        query, out, gradient = (x.permute(1, 2, 0, 3) for x in (q, out, gradient))
        softmax, block = Softmax(query, out, lse, gradient, work.scores), work.scores.block(q, v)
        total: Tensor | None = None
        coming: Passing | None = None
        for step, packed in enumerate(work.keys(torch.cat((k, v), dim=-1))):
            key, value = packed.permute(1, 2, 0, 3).split((k.shape[-1], v.shape[-1]), dim=-1)
            parts = softmax.add(key, value, work.tiles_of_step(step, block))
            total = torch.cat(parts, dim=-1).permute(2, 0, 1, 3)
            if work.ring:  # the sum travels with its keys, and is at home after the last step
                assert work.group is not None
                total = total if coming is None else total + coming.wait()
                coming = pass_on(total, work.group)
        assert total is not None
        if coming is not None:
            total = coming.wait()
        elif work.group is not None:
            total = total.contiguous().index_select(0, natural_rows(work.everyone, q.device))
            total = sum_rows(total, work.group)
        of_key, of_value = total.to(k.dtype).split((k.shape[-1], v.shape[-1]), dim=-1)
        of_sinks = None if sinks is None else softmax.of_sinks(sinks)
        return softmax.of_query.to(q.dtype).permute(2, 0, 1, 3), of_key, of_value, of_sinks, None


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, work: Work) -> Tensor:
    """q [s, b, h, d], k [s, b, g, d], v [s, b, g, v], sinks [h] or None -> [s, b, h, v]."""
    return _Attention.apply(q, k, v, sinks, work)  # type: ignore[no-any-return, no-untyped-call]
