"""What one adapter adds to one weight of the base's files: fp32 sums for any rows of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Protocol

import torch
from torch import Tensor

from mswift.converters.adapters import HfLinear, fused_blocks
from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable
from mswift.tuners.adapter import PeftAdapter
from mswift.tuners.shapes import STACKED, HfParameter, adapted_parameters, in_spelling, router_names

_PAIRS = 4
"""How many stay in memory: each is needed for every expert of its layer, two of them in turn."""


class Delta(Protocol):
    """One adapter of one weight."""

    def folded(self, total: Tensor, base: Tensor, region: Region) -> Tensor:
        """fp32 rows `region` with this adapter as well; `base`: the same rows before any."""


@dataclass(frozen=True)
class LinearDelta:
    """B @ A of a linear [out, in]; of a DoRA, rows are then scaled to their magnitude."""

    adapter: PeftAdapter
    linear: HfLinear

    def folded(self, total: Tensor, base: Tensor, region: Region) -> Tensor:
        """As Delta."""
        settings, (name_a, name_b) = self.adapter.settings, self.linear.lora_names()
        first, count = region.offsets[0], region.sizes[0]
        b = self.adapter.read(name_b, Region((first, 0), (count, settings.rank_of(self.linear.name)))).float()
        a, scale = self.adapter.tensor(name_a).float(), settings.scale_of(self.linear.name)
        total = torch.addmm(total, b, a, alpha=scale)
        if settings.dora:
            name = f"{self.linear.name}.lora_magnitude_vector"
            magnitude = self.adapter.read(name, Region((first,), (count,))).float()
            length = torch.linalg.vector_norm(torch.addmm(base, b, a, alpha=scale), dim=1)
            total *= (magnitude / length)[:, None]
        return total


Pair = tuple[Tensor, Tensor]
"""A [rank * experts, in], experts one behind the other, and B [out, rank * experts], experts in turn; fp32."""


@dataclass(frozen=True)
class ParameterDelta:
    """The adapter of a parameter (`HfParameter`: stacked experts, a router) on one tensor of the base.

    expert: whose rows the tensor holds, which are `start` and on of the parameter's; None: it is the whole parameter,
    [expert] out, in, or in, out where it is transposed.
    """

    pair: Callable[[], Pair]
    parameter: HfParameter
    rank: int
    scale: float
    expert: int | None = None
    start: int = 0

    def folded(self, total: Tensor, base: Tensor, region: Region) -> Tensor:
        """As Delta."""
        first, count = region.offsets[0], region.sizes[0]
        if total.dim() == 2:
            return total + self._delta(self.expert or 0)[self.start + first :][:count]
        deltas = [self._delta(expert) for expert in range(first, first + count)]
        return total + torch.stack([delta.t() if self.parameter.transposed else delta for delta in deltas])

    def _delta(self, expert: int) -> Tensor:
        """scale * B @ A of one expert."""
        a, b = self.pair()
        return self.scale * (b[:, expert :: self.parameter.num_experts] @ a[expert * self.rank :][: self.rank])


def parameter_deltas(table: ModelTable, own: ModelTable, adapter: PeftAdapter) -> Iterator[tuple[str, ParameterDelta]]:
    """(weight, delta) of every tensor of the base's files in which a parameter with an adapter lies.

    table: in the files' spelling, one tensor an expert or one for all; own: in that of the adapter's names.
    """
    stacked = in_spelling(table, STACKED)
    pairs = zip(router_names(stacked), router_names(table), strict=True)
    in_files, spread = dict(pairs), _spread(table, stacked)
    pair = lru_cache(_PAIRS)(lambda prefix: _pair(adapter, prefix))
    for prefix, parameter in adapted_parameters(own, adapter.settings).items():
        name, settings = parameter.name, adapter.settings
        whole = ParameterDelta(partial(pair, prefix), parameter, settings.rank_of(name), settings.scale_of(name))
        if name not in spread:
            yield in_files.get(name, name), whole
            continue
        for pattern, start in spread[name]:
            for expert in range(parameter.num_experts):
                yield pattern.format(e=expert), replace(whole, expert=expert, start=start)


def _pair(adapter: PeftAdapter, prefix: str) -> Pair:
    a, b = (adapter.tensor(f"{prefix}.lora_{one}.weight").float() for one in "AB")
    return a, b


def _spread(table: ModelTable, stacked: ModelTable) -> dict[str, list[tuple[str, int]]]:
    """Stacked parameter -> the weights of an expert (`{e}`) that make it up, and the row at which each begins."""
    if table.spelling == stacked.spelling:
        return {}
    found: dict[str, list[tuple[str, int]]] = {}
    each = fused_blocks(table, experts=True)
    for path, blocks in fused_blocks(stacked, experts=True).items():
        for block, single in zip(blocks, each[path], strict=True):
            for layer in range(table.spec.num_layers):
                weight = single.hf.format(l=layer, e="{e}") + ".weight"
                found.setdefault(block.hf.format(l=layer), []).append((weight, block.start))
    return found
