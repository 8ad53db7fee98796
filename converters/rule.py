"""What a rule of a family table is: how Hugging Face (HF) tensors lie in one Megatron tensor.

A rule is a frozen value. Its Megatron tensor is a sequence of `units` along its row axis (KV groups for qkv, one
unit otherwise), each unit holding the rows of every part in turn; trailing axes are shared. Sizes are sums of
products of names and numbers ("heads*head_dim+2*groups*head_dim") looked up in the model's sizes, so that one table
serves every model of a family. In HF names `{l}` stands for the layer number and `{e}` for the expert.

Megatron keys are written without the layer: `decoder.layers.` + the rest. Where all layers hold the same tensors
megatron-core stores them as one, with a leading layer axis; else one for each layer, `decoder.layers.3.` + the rest.
Keys of `mtp.layers.` (multi-token prediction) are never stacked. Tensors of experts have an expert axis before the
rows, behind the layer axis if there is one. Only indices move: no rule does arithmetic on weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mswift.converters.layout import Dim, Piece

Sizes = Mapping[str, int]

LAYERS = "decoder.layers."
"""Megatron keys with this prefix belong to a layer."""

MTP_LAYERS = "mtp.layers."
"""Megatron keys with this prefix belong to a multi-token-prediction layer, which HF counts behind the others."""


def size_of(expression: str, sizes: Sizes) -> int:
    """Value of "name", "name*name", "2*name+name*name"."""
    total = 0
    for term in expression.split("+"):
        value = 1
        for name in term.split("*"):
            value *= int(name) if name.isdigit() else sizes[name]
        total += value
    return total


@dataclass(frozen=True)
class Part:
    """Rows of one HF tensor: `rows` of them in every unit.

    Where they are not the whole tensor: the first one is `start`, the next one `step` rows on, and the tensor has
    `of` rows in all. Where other rows lie between them: they come in runs of `run` (a divisor of `rows`), each
    starting `every` rows behind the one before, from unit to unit as well.
    """

    hf: str
    rows: str
    start: str = "0"
    step: int = 1
    of: str = ""
    run: str = ""
    every: str = ""


@dataclass(frozen=True)
class Cut:
    """Tensor parallelism cuts `axis` (layer and expert axes not counted) in units of `unit`, in `blocks` equal blocks.

    uneven: the count need not divide; a rank takes ceil(count / ranks) and the last ones less.
    """

    axis: int
    unit: str
    blocks: int = 1
    uneven: bool = False


@dataclass(frozen=True)
class Rule:
    """`when`: names, separated by blanks, of model or layer features without which the rule does not exist.

    experts: "each": one HF tensor an expert; "stacked": the HF tensor has an expert axis first. transposed: the
    HF tensor has the width before the rows. own_dtype: the tensor may have another dtype than the model's weights.
    """

    kind: str
    megatron: str
    parts: tuple[Part, ...]
    units: str = "one"
    width: tuple[str, ...] = ()
    cut: Cut | None = None
    when: str = ""
    experts: Literal["", "each", "stacked"] = ""
    transposed: bool = False
    own_dtype: bool = False

    @property
    def in_layer(self) -> bool:
        return self.megatron.startswith(LAYERS)

    @property
    def in_mtp(self) -> bool:
        return self.megatron.startswith(MTP_LAYERS)

    def hf_shape(self, part: Part, sizes: Sizes) -> tuple[int, ...]:
        """Shape of one HF tensor of this rule."""
        rows = size_of(part.of, sizes) if part.of else size_of(self.units, sizes) * size_of(part.rows, sizes)
        width = tuple(size_of(w, sizes) for w in self.width)
        lead = (sizes["experts"],) if self.experts == "stacked" else ()
        return (*lead, *width, rows) if self.transposed else (*lead, rows, *width)

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Shape of the Megatron tensor of one layer (of one expert)."""
        rows = size_of(self.units, sizes) * sum(size_of(part.rows, sizes) for part in self.parts)
        return (rows, *(size_of(w, sizes) for w in self.width))

    def pieces(self, sizes: Sizes, key: str, layer: int | None, lead: tuple[int, ...], experts: range) -> list[Piece]:
        """Maps HF tensor (side 0) -> Megatron tensor `key` (side 1).

        layer: its number in HF names; lead: index on the layer axis, () where there is none; experts: which of
        them (any range of one where there are none).
        """
        if self.experts == "each":
            first = self._of_expert(sizes, key, layer, (*lead, 0), 0, None)
            return [
                Piece((part.hf.format(l=layer, e=e), key), (at[0], (*lead, e, *at[1][len(lead) + 1 :])), piece.dims)
                for e in experts
                for part, piece, at in zip(self.parts, first, (p.starts for p in first), strict=True)
            ]
        if self.experts == "stacked":
            return self._of_expert(sizes, key, layer, (*lead, experts.start), None, experts)
        return self._of_expert(sizes, key, layer, lead, None, None)

    def _of_expert(
        self,
        sizes: Sizes,
        key: str,
        layer: int | None,
        lead: tuple[int, ...],
        expert: int | None,
        stacked: range | None,
    ) -> list[Piece]:
        units = size_of(self.units, sizes)
        width = [size_of(w, sizes) for w in self.width]
        unit_rows = sum(size_of(part.rows, sizes) for part in self.parts)
        hf_lead = () if stacked is None else (stacked.start,)
        hf_row = len(hf_lead) + (len(width) if self.transposed else 0)
        hf_width = len(hf_lead) + (0 if self.transposed else 1)
        row = len(lead)
        pieces, at = [], 0
        for part in self.parts:
            rows = size_of(part.rows, sizes)
            run = size_of(part.run, sizes) if part.run else rows
            every = size_of(part.every, sizes) if part.every else run * part.step
            steps = ((units, rows // run * every, unit_rows), (rows // run, every, run), (run, part.step, 1))
            dims = [Dim(count, (hf_row, row), (there, here)) for count, there, here in steps]
            dims += [Dim(n, (hf_width + i, row + 1 + i), (1, 1)) for i, n in enumerate(width)]
            if stacked is not None:
                dims.append(Dim(len(stacked), (0, row - 1), (1, 1)))
            hf_start = [*hf_lead, *(0 for _ in range(1 + len(width)))]
            hf_start[hf_row] = size_of(part.start, sizes)
            starts = (tuple(hf_start), (*lead, at, *(0 for _ in width)))
            names = (part.hf.format(l=layer, e=expert), key)
            pieces.append(Piece(names, starts, tuple(d for d in dims if d.size != 1)))
            at += rows
        return pieces


@dataclass(frozen=True)
class Drop:
    """HF tensors that some checkpoints hold and no model reads; recorded in the manifest with the reason.

    same_as: their bytes must equal that tensor's (and come back from it).
    """

    hf: str
    reason: str
    same_as: str = ""
    when: str = ""
