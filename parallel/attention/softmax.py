"""Attention put together from tiles: their outputs are merged by log-sum-exp, their gradients added.

Shapes: s rows, u keys, b batch, h query heads, g KV heads, d head dimension of queries and keys, v of values; as
kernels want them, [b, heads, rows, dimension]. Sums are in fp32 (fp64 for fp64).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mswift.parallel.attention.kernels import Scores, tile_backward, tile_forward
from mswift.parallel.attention.tiles import Tile


class Merged:
    """Output [b, h, s, v] and log-sum-exp [b, h, s] of the tiles seen so far."""

    def __init__(self, query: Tensor, value_width: int, scores: Scores) -> None:
        dtype = torch.promote_types(query.dtype, torch.float32)
        self._query, self._scores = query, scores
        self.out = query.new_zeros((*query.shape[:3], value_width), dtype=dtype)
        self.lse = query.new_full(query.shape[:3], float("-inf"), dtype=dtype)

    def add(self, key: Tensor, value: Tensor, tiles: Sequence[Tile]) -> None:
        """Take tiles of the same softmax in."""
        for tile in tiles:
            rows, keys = _rows(tile), _keys(tile)
            out, lse = tile_forward(self._query[:, :, rows], key[:, :, keys], value[:, :, keys], tile, self._scores)
            old_out, old_lse = self.out[:, :, rows], self.lse[:, :, rows]
            new_lse = torch.logaddexp(old_lse, lse)
            old_out.mul_(torch.exp(old_lse - new_lse).unsqueeze(-1))
            old_out.add_(out * torch.exp(lse - new_lse).unsqueeze(-1))
            old_lse.copy_(new_lse)

    def add_sinks(self, sinks: Tensor) -> None:
        """Take logits [h] in that carry no value."""
        new_lse = torch.logaddexp(self.lse, sinks.to(self.lse.dtype)[None, :, None])
        self.out.mul_(torch.exp(self.lse - new_lse).unsqueeze(-1))
        self.lse = new_lse


@dataclass
class Softmax:
    """A finished attention, for its backward pass; `gradient` is that of `out`."""

    query: Tensor
    out: Tensor
    lse: Tensor
    gradient: Tensor
    scores: Scores

    def __post_init__(self) -> None:
        self.of_query = torch.zeros_like(self.query, dtype=self.lse.dtype)

    def add(self, key: Tensor, value: Tensor, tiles: Sequence[Tile]) -> tuple[Tensor, Tensor]:
        """Gradients of keys and values from these tiles; that of the queries is added up in `of_query`."""
        of_key, of_value = (torch.zeros_like(x, dtype=self.lse.dtype) for x in (key, value))
        for tile in tiles:
            rows, keys = _rows(tile), _keys(tile)
            inputs = (self.gradient[:, :, rows], self.query[:, :, rows], key[:, :, keys], value[:, :, keys])
            parts = tile_backward(*inputs, self.out[:, :, rows], self.lse[:, :, rows], tile, self.scores)
            self.of_query[:, :, rows] += parts[0]
            of_key[:, :, keys] += parts[1]
            of_value[:, :, keys] += parts[2]
        return of_key, of_value

    def of_sinks(self, sinks: Tensor) -> Tensor:
        """Gradient of the logits without value."""
        weights = torch.exp(sinks.to(self.lse.dtype)[None, :, None] - self.lse)
        inner = (self.gradient * self.out).to(self.lse.dtype).sum(-1)
        return -(weights * inner).sum(dim=(0, 2)).to(sinks.dtype)


def _rows(tile: Tile) -> slice:
    return slice(tile.query, tile.query + tile.num_queries)


def _keys(tile: Tile) -> slice:
    return slice(tile.key, tile.key + tile.num_keys)
