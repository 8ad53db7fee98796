"""Which rectangles of scores a causal attention computes: queries of some rows, keys of some rows, one document.

Torch-free arithmetic. A *tile* is a rectangle in which every query sees a key and every key is seen.
"""

from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from mswift.parallel.attention.share import Segment

BLOCK = 1024
"""Most rows and keys of a tile whose scores are masked or written out: no mask is larger than BLOCK * BLOCK."""


class Tile(NamedTuple):
    """Rows query .. query + num_queries against keys key .. key + num_keys.

    behind: position of the first query minus that of the first key; query i sees key j where
    0 <= behind + i - j, and below the window where there is one.
    """

    query: int
    num_queries: int
    key: int
    num_keys: int
    behind: int

    def is_full(self, window: int | None) -> bool:
        """Whether every query sees every key."""
        return self.behind >= self.num_keys - 1 and (window is None or self.behind + self.num_queries <= window)

    def is_causal(self, window: int | None) -> bool:
        """Whether query i sees keys 0..i."""
        return self.behind == 0 and self.num_queries == self.num_keys and (window is None or self.num_keys <= window)


@lru_cache(maxsize=256)
def tiles(
    queries: tuple[Segment, ...], keys: tuple[Segment, ...], window: int | None, block: int | None
) -> tuple[Tile, ...]:
    """What `queries` see of `keys`. block: most rows and keys of any tile; None: of tiles that a window cuts, BLOCK."""
    of_document: dict[int, list[Segment]] = defaultdict(list)
    for segment in keys:
        of_document[segment.document].append(segment)
    found: list[Tile] = []
    for query in queries:
        for key in of_document[query.document]:
            behind = query.position - key.position
            if behind + query.length <= 0:
                continue  # all keys come later
            is_cut = window is not None and behind + query.length > window
            pair = _blocks(query, key, window, block or BLOCK) if is_cut or block else _large(query, key)
            for tile in pair:
                _append(found, tile, window, joined=block is None)
    return tuple(found)


def _large(query: Segment, key: Segment) -> Iterator[Tile]:
    """Without a window: the keys before the queries, the triangle, the queries behind the keys."""
    behind = query.position - key.position
    before = min(max(behind, 0), key.length)
    if before:
        yield Tile(query.row, query.length, key.row, before, behind)
    first = max(-behind, 0)
    diagonal = min(key.length - before, query.length - first)
    if diagonal:
        yield Tile(query.row + first, diagonal, key.row + before, diagonal, 0)
        after = query.length - first - diagonal
        if after:
            yield Tile(query.row + first + diagonal, after, key.row + before, diagonal, diagonal)


def _blocks(query: Segment, key: Segment, window: int | None, size: int) -> Iterator[Tile]:
    """The rectangle in blocks, each cut to the queries that see a key of it and the keys that are seen."""
    behind = query.position - key.position
    reach = window or behind + query.length  # nothing lies further back than that
    for first in range(0, query.length, size):
        stop = min(first + size, query.length)
        oldest = max(0, behind + first - reach + 1)
        for start in range(oldest, min(key.length, behind + stop), size):
            end = min(start + size, key.length, behind + stop)
            top, bottom = max(first, start - behind), min(stop, end - 1 + reach - behind)
            if top < bottom:
                yield Tile(query.row + top, bottom - top, key.row + start, end - start, behind + top - start)


def _append(found: list[Tile], tile: Tile, window: int | None, *, joined: bool) -> None:
    """Add a tile; where `joined`, full tiles of the same queries on neighbouring keys become one."""
    last = found[-1] if found else None
    if (
        joined
        and last is not None
        and last[:2] == tile[:2]
        and last.key + last.num_keys == tile.key
        and last.behind - last.num_keys == tile.behind
        and last.is_full(window)
        and tile.is_full(window)
    ):
        found[-1] = last._replace(num_keys=last.num_keys + tile.num_keys)
    else:
        found.append(tile)
