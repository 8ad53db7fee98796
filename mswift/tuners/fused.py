"""Adapters of several HF linears as one adapter of the Megatron linear that fuses them, and back, bit for bit.

Shapes: i inputs, o outputs of an HF linear, O their sum, r its rank, R the rank of the fused adapter.
A fused adapter is A [R, i] and B [O, R], rows of B laid as the Megatron weight lays the linears'.

  shared    the linears have one A in common: it is A, and B holds their rows (q, k, v by KV group)
  stacked   A = [Aq; Ak; Av], rank 3r; B holds Bq in the first r columns of q's rows, Bk in the next r of k's, ...

Missing ranks are zero rows of A and zero columns of B. Both compute B @ A exactly as the linears' own adapters do:
what is added to their sums is zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from mswift.converters.rule import Rule, Sizes
from mswift.tuners.arrays import Bits, view


@dataclass(frozen=True)
class Pair:
    """A [r, i] and B [o, r] of one HF linear (or [R, i] and [O, R] of a fused one), of a DoRA the magnitude [o]."""

    a: Bits
    b: Bits
    magnitude: Bits | None = None


@dataclass(frozen=True)
class Fusion:
    """How a rule of the table fuses HF linears: `rule` is that of the weight, `sizes` those of the model."""

    rule: Rule
    sizes: Sizes

    def members(self, layer: int | None) -> list[str]:
        """Names of the HF linears, in the order of their rows."""
        return list(dict.fromkeys(part.hf.format(l=layer).removesuffix(".weight") for part in self.rule.parts))

    def same_a(self, pairs: Mapping[str, Pair]) -> bool:
        """Whether all have one A, bit for bit."""
        first, *rest = (pair.a for pair in pairs.values())
        return all(np.array_equal(first, other) for other in rest)

    def fuse(self, layer: int | None, pairs: Mapping[str, Pair], rank: int, *, stack: bool) -> Pair:
        """`pairs` by name of the linear; a linear without one has zeros. rank: R."""
        first = next(iter(pairs.values()))
        a = np.zeros((rank, first.a.shape[1]), first.a.dtype)
        b = np.zeros((self.rule.shape(self.sizes)[0], rank), first.b.dtype)
        for name, start in self._columns(pairs, stack).items():
            width = pairs[name].a.shape[0]
            a[start : start + width] = pairs[name].a
            self._move_rows(layer, name, pairs[name].b, b[:, start : start + width], to_fused=True)
        magnitude = None
        if first.magnitude is not None:
            magnitude = np.zeros(b.shape[0], first.magnitude.dtype)
            for name, pair in pairs.items():
                assert pair.magnitude is not None
                self._move_rows(layer, name, pair.magnitude, magnitude, to_fused=True)
        return Pair(a, b, magnitude)

    def split(self, layer: int | None, fused: Pair, ranks: Mapping[str, int], *, stack: bool) -> dict[str, Pair]:
        """The inverse; `ranks` by name of the linears that have an adapter."""
        starts = dict.fromkeys(ranks, 0)
        if stack:
            starts = dict(zip(ranks, [0, *accumulate(ranks.values())], strict=False))
        pairs = {}
        for name, rank in ranks.items():
            columns = slice(starts[name], starts[name] + rank)
            b = np.empty((self._rows_of(layer, name), rank), fused.b.dtype)
            self._move_rows(layer, name, b, fused.b[:, columns], to_fused=False)
            magnitude = None
            if fused.magnitude is not None:
                magnitude = np.empty(b.shape[0], fused.magnitude.dtype)
                self._move_rows(layer, name, magnitude, fused.magnitude, to_fused=False)
            pairs[name] = Pair(fused.a[columns].copy(), b, magnitude)
        return pairs

    @staticmethod
    def _columns(pairs: Mapping[str, Pair], stack: bool) -> dict[str, int]:
        """First row of A and column of B of every linear."""
        ranks = [pair.a.shape[0] for pair in pairs.values()]
        return dict(zip(pairs, [0, *accumulate(ranks)] if stack else [0] * len(ranks), strict=False))

    def _rows_of(self, layer: int | None, name: str) -> int:
        part = next(part for part in self.rule.parts if part.hf.format(l=layer) == f"{name}.weight")
        return self.rule.hf_shape(part, self.sizes)[0]

    def _move_rows(self, layer: int | None, name: str, own: Bits, fused: Bits, *, to_fused: bool) -> None:
        """Between the rows of one linear [o, ...] and their places among the fused ones [O, ...]."""
        width = {"width": own.shape[1]} if own.ndim > 1 else {}
        rule = replace(self.rule, width=tuple(width))
        for piece in rule.pieces({**self.sizes, **width}, "", layer, (), range(1)):
            if piece.names[0] == f"{name}.weight":
                source, target = (own, fused) if to_fused else (fused, own)
                side = 0 if to_fused else 1
                view(target, piece, 1 - side)[...] = view(source, piece, side)
