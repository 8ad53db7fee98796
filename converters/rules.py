"""The vocabulary of the family tables: how Hugging Face (HF) tensors lie in Megatron tensors.

A rule is a frozen value. Its Megatron tensor is a sequence of `units` along axis 0 (KV groups for qkv, one unit
otherwise), each unit holding the rows of every part in turn; trailing axes are shared. Sizes are names or
products of names ("groups*head_dim") looked up in the model's sizes, so that one table serves every model of a
family. `{l}` stands for the layer number in HF names; Megatron keys of layers are stacked: no number, leading
axis of length `layers`. Only indices move: no rule does arithmetic on weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mswift.converters.layout import Dim, Piece

Sizes = Mapping[str, int]

STACK = "decoder.layers."
"""Megatron keys with this prefix hold all layers, one per index of axis 0."""


def size_of(expression: str, sizes: Sizes) -> int:
    """Value of "name" or "name*name"."""
    value = 1
    for name in expression.split("*"):
        value *= sizes[name]
    return value


@dataclass(frozen=True)
class Part:
    """One HF tensor: `rows` rows of it in every unit."""

    hf: str
    rows: str


@dataclass(frozen=True)
class Cut:
    """Tensor parallelism cuts `axis` (layer axis not counted) in units of `unit`, in `blocks` equal blocks.

    uneven: the count need not divide; a rank takes ceil(count / ranks) and the last ones less.
    """

    axis: int
    unit: str
    blocks: int = 1
    uneven: bool = False


@dataclass(frozen=True)
class Rule:
    """`when`: name of the model feature without which the rule does not exist ("" = always)."""

    kind: str
    megatron: str
    parts: tuple[Part, ...]
    units: str = "one"
    width: tuple[str, ...] = ()
    cut: Cut | None = None
    when: str = ""

    @property
    def stacked(self) -> bool:
        return self.megatron.startswith(STACK)

    def hf_shape(self, part: Part, sizes: Sizes) -> tuple[int, ...]:
        """Shape of one HF tensor of this rule."""
        return (
            size_of(self.units, sizes) * size_of(part.rows, sizes),
            *(size_of(w, sizes) for w in self.width),
        )

    def megatron_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Shape of the Megatron tensor; stacked ones have the layer axis first."""
        rows = sum(self.hf_shape(part, sizes)[0] for part in self.parts)
        layer = (sizes["layers"],) if self.stacked else ()
        return (*layer, rows, *(size_of(w, sizes) for w in self.width))

    def pieces(self, sizes: Sizes, layer: int | None) -> list[Piece]:
        """One map per HF tensor (side 0) into the Megatron tensor (side 1), for one layer of a stacked rule."""
        units = size_of(self.units, sizes)
        width = [size_of(w, sizes) for w in self.width]
        unit_rows = sum(size_of(part.rows, sizes) for part in self.parts)
        lead = () if layer is None else (layer,)
        row_axis = len(lead)
        pieces, start = [], 0
        for part in self.parts:
            rows = size_of(part.rows, sizes)
            dims = [Dim(units, (0, row_axis), (rows, unit_rows)), Dim(rows, (0, row_axis), (1, 1))]
            dims += [Dim(n, (1 + i, row_axis + 1 + i), (1, 1)) for i, n in enumerate(width)]
            starts = ((0,) * (1 + len(width)), (*lead, start, *(0 for _ in width)))
            pieces.append(
                Piece((part.hf.format(l=layer), self.megatron), starts, tuple(d for d in dims if d.size != 1))
            )
            start += rows
        return pieces


@dataclass(frozen=True)
class Drop:
    """HF tensors that some checkpoints hold and no model reads; recorded in the manifest with the reason."""

    hf: str
    reason: str


def rows(unit: str, *, blocks: int = 1, uneven: bool = False) -> Cut:
    """Column-parallel: output rows are cut."""
    return Cut(0, unit, blocks, uneven)


def columns(unit: str) -> Cut:
    """Row-parallel: input columns are cut."""
    return Cut(1, unit)


def same(megatron: str, hf: str, shape: tuple[str, ...], *, cut: Cut | None = None, when: str = "") -> Rule:
    """The same tensor under another name (stacked over layers if the key is)."""
    return Rule("same", megatron, (Part(hf, shape[0]),), "one", shape[1:], cut, when)


def qkv(megatron: str, q: str, k: str, v: str, *, width: tuple[str, ...], when: str = "") -> Rule:
    """Per KV group: its query heads, its key head, its value head. Cut between groups."""
    parts = (Part(q, "heads_per_group*head_dim"), Part(k, "head_dim"), Part(v, "head_dim"))
    return Rule("qkv", megatron, parts, "groups", width, rows("groups"), when)


def gate_up(megatron: str, gate: str, up: str, *, width: tuple[str, ...], when: str = "") -> Rule:
    """[gate; up], whatever the tensor-parallel size; a rank takes its slice of each half."""
    parts = (Part(gate, "ffn"), Part(up, "ffn"))
    return Rule("gate_up", megatron, parts, "one", width, rows("ffn", blocks=2), when)


def drop(hf: str, reason: str) -> Drop:
    """An HF tensor that is left out for a stated reason."""
    return Drop(hf, reason)
