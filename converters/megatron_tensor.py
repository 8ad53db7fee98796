"""A global Megatron tensor of one model, and the part of it that a tensor-parallel rank holds."""

from dataclasses import dataclass

from mswift.converters.layout import Region
from mswift.converters.rule import Rule, Sizes, size_of


@dataclass(frozen=True)
class MegatronTensor:
    """A global Megatron tensor: its key in torch_dist files, its shape, the rule that makes it.

    layer: its layer (HF count) where layers are kept apart; None where it holds all layers, or lies outside them.
    Axes: [layer if stacked] [expert if the rule has experts] rows, width.
    """

    key: str
    shape: tuple[int, ...]
    rule: Rule
    layer: int | None = None
    stacked: bool = False

    @property
    def num_lead_axes(self) -> int:
        """How many axes come before the rows."""
        return self.stacked + bool(self.rule.experts)

    def shard(
        self, sizes: Sizes, tp_rank: int, tp_size: int, layer: int | None, expert: int | None
    ) -> tuple[Region, ...]:
        """`ModelTable.shard` of a tensor that `tp_size` does cut."""
        cut = self.rule.cut
        for given, needed, what in ((layer, self.stacked, "layer"), (expert, bool(self.rule.experts), "expert")):
            if needed != (given is not None):
                raise ValueError(
                    f"{self.key}: {what} {'is missing' if needed else 'given, but the tensor has no such axis'}"
                )
        lead = tuple(n for n in (layer, expert) if n is not None)
        offsets = (*lead, *(0 for _ in self.shape[len(lead) :]))
        lengths = [*(1 for _ in lead), *self.shape[len(lead) :]]
        if cut is None:
            return (Region(offsets, tuple(lengths)),)
        axis, units = cut.axis + len(lead), size_of(cut.unit, sizes)
        rows = self.shape[axis] // cut.blocks // units  # rows of one unit
        step = -(-units // tp_size)
        first, last = min(units, tp_rank * step), min(units, (tp_rank + 1) * step)
        regions = []
        for block in range(cut.blocks):
            if first < last:
                start, size = list(offsets), list(lengths)
                start[axis] = (block * units + first) * rows
                size[axis] = (last - first) * rows
                regions.append(Region(tuple(start), tuple(size)))
        return tuple(regions)
