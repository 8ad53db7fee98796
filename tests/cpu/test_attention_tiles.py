"""Shares of a context-parallel rank and tiles of scores: every visible pair once, no other, nothing large in memory."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mswift.parallel.attention import core, tiles
from mswift.parallel.attention.share import Share, natural_rows, positions, rows_in_order, segments
from mswift.parallel.attention.tiles import Tile

CPU = torch.device("cpu")
ONE = SimpleNamespace(context_parallel_size=1)


@st.composite
def shares(draw: st.DrawFn) -> tuple[Share, Share]:
    """Queries of some ranks and keys of some ranks of one group."""
    size = draw(st.integers(1, 4))
    unit = 2 * size if size > 1 else 1
    lengths = tuple(unit * n for n in draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    ranks = st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True)
    return Share(lengths, tuple(draw(ranks)), size), Share(lengths, tuple(draw(ranks)), size)


@given(shares())
def test_ranks_hold_every_position_once_and_as_much_work(pair: tuple[Share, Share]) -> None:
    share = pair[0]
    everyone = share.of(*range(share.size))
    rows, total = natural_rows(everyone, CPU), sum(share.lengths)
    assert sorted(rows.tolist()) == list(range(total))
    assert rows[rows_in_order(everyone, CPU)].tolist() == list(range(total))
    work = [(positions(share.of(rank), CPU) + 1).sum() for rank in range(share.size)]
    assert len({int(w) for w in work}) == 1


@given(shares(), st.none() | st.integers(1, 12), st.none() | st.integers(1, 5))
def test_tiles_hold_every_visible_pair_once(pair: tuple[Share, Share], window: int | None, block: int | None) -> None:
    queries, keys = pair
    found = tiles.tiles(segments(queries), segments(keys), window, block)
    seen = torch.zeros(sum(s.length for s in segments(queries)), sum(s.length for s in segments(keys)), dtype=torch.int)
    for tile in found:
        mask = _mask(tile, window)
        seen[tile.query : tile.query + tile.num_queries, tile.key : tile.key + tile.num_keys] += mask
        assert mask.any(1).all()  # a softmax of nothing would be nan
        assert tile.is_full(window) == bool(mask.all())
        if tile.is_causal(window):
            assert torch.equal(mask, torch.ones_like(mask).tril())
        assert block is None or max(tile.num_queries, tile.num_keys) <= block
    assert torch.equal(seen, _visible(queries, keys, window))


def _mask(tile: Tile, window: int | None) -> torch.Tensor:
    behind = tile.behind + torch.arange(tile.num_queries)[:, None] - torch.arange(tile.num_keys)
    return ((behind >= 0) & (behind < (window or 10**9))).int()


def _visible(queries: Share, keys: Share, window: int | None) -> torch.Tensor:
    """[queries, keys] by position and document of every row."""
    (mine, of_mine), (theirs, of_theirs) = ((positions(s, CPU), _documents(s)) for s in (queries, keys))
    behind = mine[:, None] - theirs
    return ((of_mine[:, None] == of_theirs) & (behind >= 0) & (behind < (window or 10**9))).int()


def _documents(share: Share) -> torch.Tensor:
    return torch.cat([torch.full((s.length,), s.document) for s in segments(share)])


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


KINDS: dict[str, dict[str, Any]] = {
    "documents": {},
    "window": {"window": 700},
    "soft-cap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "wide keys": {"v": 4},
}


@pytest.mark.parametrize("name", KINDS)
def test_no_mask_and_no_scores_of_all_pairs(name: str) -> None:
    """8192 packed positions: the largest tensor, forward and backward, is far below 4096 * 4096."""
    kind = dict(KINDS[name])
    lengths = (3000, 100, 5092)
    sinks, width = kind.pop("sinks", False), kind.pop("v", 8)
    module = core.SdpaAttention(ONE, **kind)
    module.sinks = torch.zeros(2, requires_grad=True) if sinks else None
    q, k, v = (torch.randn(8192, heads, d, requires_grad=True) for heads, d in ((2, 8), (1, 8), (1, width)))
    with Largest() as largest:
        module(q, k, v, packed_seq_params=SimpleNamespace(lengths=lengths)).sum().backward()
    assert q.grad is not None
    assert largest.elements <= 2 * tiles.BLOCK**2
