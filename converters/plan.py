"""A family table applied to one config.json, and the proof that it moves every element exactly once."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mswift.converters.catalog import family_for, spec_for
from mswift.converters.family import Family, features_of, sizes_of
from mswift.converters.layout import Piece, Region, tiling_fault
from mswift.converters.rules import Drop, Rule, size_of
from mswift.converters.spec import ModelSpec
from mswift.errors import CheckpointError
from mswift.topology import check_tensor_parallel

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8,
    "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
}  # fmt: skip
"""Item size by safetensors' name of the dtype."""

WEIGHT_DTYPES = ("F32", "BF16", "F16")
"""Dtypes that a model's weights may have here."""

LARGEST_GRID = 8


@dataclass(frozen=True)
class MegatronTensor:
    """A global Megatron tensor: its key in torch_dist files, its shape, the rule that makes it."""

    key: str
    shape: tuple[int, ...]
    rule: Rule


class ModelTable:
    """What `family_for(config)` says about the tensors of this very model."""

    def __init__(self, config: dict[str, Any], family: Family, spec: ModelSpec) -> None:
        self.config = config
        self.family = family
        self.spec = spec
        self.sizes = sizes_of(spec)
        features = features_of(spec)
        rules = [r for r in family.table if isinstance(r, Rule) and r.when in features]
        self.megatron: Mapping[str, MegatronTensor] = {
            r.megatron: MegatronTensor(r.megatron, r.megatron_shape(self.sizes), r) for r in rules
        }
        hf: dict[str, tuple[int, ...]] = {}
        for rule in rules:
            for layer in self._layers(rule):
                hf.update({p.hf.format(l=layer): rule.hf_shape(p, self.sizes) for p in rule.parts})
        self.hf: Mapping[str, tuple[int, ...]] = hf
        self.dropped: Mapping[str, str] = {
            d.hf.format(l=layer): d.reason
            for d in family.table
            if isinstance(d, Drop)
            for layer in range(spec.num_layers)
        }

    def _layers(self, rule: Rule) -> Iterator[int | None]:
        yield from range(self.spec.num_layers) if rule.stacked else (None,)

    def pieces(self, key: str, layer: int | None = None) -> list[Piece]:
        """Maps HF tensor -> Megatron tensor `key`; of one layer, or (None) of all."""
        rule = self.megatron[key].rule
        layers = self._layers(rule) if layer is None else (layer,)
        return [piece for each in layers for piece in rule.pieces(self.sizes, each)]

    @cached_property
    def hf_pieces(self) -> Mapping[str, Piece]:
        """HF name -> its map (side 0) into its Megatron tensor (side 1)."""
        return {piece.names[0]: piece for key in self.megatron for piece in self.pieces(key)}

    @cached_property
    def hf_order(self) -> list[str]:
        """HF names as files hold them: what is before the layers, layer after layer, what is after."""
        before: list[str] = []
        inside: list[tuple[int, str]] = []
        after: list[str] = []
        for key, tensor in self.megatron.items():
            for piece in self.pieces(key):
                if tensor.rule.stacked:
                    inside.append((piece.starts[1][0], piece.names[0]))
                else:
                    (after if inside else before).append(piece.names[0])
        return [*before, *(name for _, name in sorted(inside, key=lambda pair: pair[0])), *after]

    def hf_modules(self, key: str) -> tuple[str, ...]:
        """Leaf names of the HF modules fused in it, in order: ("q_proj", "k_proj", "v_proj"), ..."""
        return tuple(part.hf.split(".")[-2] for part in self.megatron[key].rule.parts)

    def shard(self, key: str, tp_rank: int, tp_size: int, layer: int | None = None) -> tuple[Region, ...]:
        """Regions of the global tensor whose concatenation along the cut axis is that rank's parameter.

        One region, or one per half of [gate; up]. Real vocabulary only: a rank's regions may hold fewer rows
        than its padded parameter, or be absent. A stacked key needs `layer`; its regions have leading size 1.
        LayoutError if tp_size does not divide the unit that is cut.
        """
        tensor = self.megatron[key]
        rule, cut = tensor.rule, tensor.rule.cut
        if rule.stacked != (layer is not None):
            raise ValueError(f"{key}: layer {'is missing' if rule.stacked else 'given, but it is not stacked'}")
        lead = () if layer is None else (layer,)
        offsets, sizes = (*lead, *(0 for _ in tensor.shape[len(lead) :])), list(tensor.shape)
        if lead:
            sizes[0] = 1
        if cut is None:
            return (Region(offsets, tuple(sizes)),)
        axis, units = cut.axis + len(lead), size_of(cut.unit, self.sizes)
        if not cut.uneven and units % tp_size:
            self.check_tp(tp_size)
        rows = tensor.shape[axis] // cut.blocks // units  # rows of one unit
        step = -(-units // tp_size)
        first, last = min(units, tp_rank * step), min(units, (tp_rank + 1) * step)
        regions = []
        for block in range(cut.blocks):
            if first < last:
                start, size = list(offsets), list(sizes)
                start[axis] = (block * units + first) * rows
                size[axis] = (last - first) * rows
                regions.append(Region(tuple(start), tuple(size)))
        return tuple(regions)

    def check_tp(self, tp_size: int) -> None:
        """LayoutError if that tensor-parallel size cuts a KV group or the ffn unevenly; names sizes that work."""
        check_tensor_parallel(
            tp_size,
            num_attention_heads=self.spec.num_attention_heads,
            num_kv_heads=self.spec.num_kv_heads,
            ffn_hidden_size=self.spec.ffn_hidden_size,
        )

    @cached_property
    def storage_grid(self) -> int:
        """Chunks per tensor-parallel axis in files we write: the largest power of two up to 8 that fits."""
        grid = LARGEST_GRID
        while self.spec.num_kv_heads % grid or self.spec.ffn_hidden_size % grid:
            grid //= 2
        return grid

    def storage_regions(self, key: str) -> list[Region]:
        """The chunks in which a converted checkpoint stores that tensor."""
        rule = self.megatron[key].rule
        return [
            region
            for layer in self._layers(rule)
            for rank in range(self.storage_grid if rule.cut else 1)
            for region in self.shard(key, rank, self.storage_grid if rule.cut else 1, layer)
        ]

    def prove_coverage(self) -> None:
        """CheckpointError unless the rules consume every HF element and write every Megatron element once."""
        boxes: tuple[dict[str, list[Region]], dict[str, list[Region]]] = ({}, {})
        for key in self.megatron:
            for piece in self.pieces(key):
                for side in (0, 1):
                    boxes[side].setdefault(piece.names[side], []).extend(piece.boxes(side))
        shapes = (self.hf, {key: tensor.shape for key, tensor in self.megatron.items()})
        for side, what in ((0, "Hugging Face"), (1, "Megatron")):
            for name, shape in shapes[side].items():
                fault = tiling_fault(boxes[side].get(name, []), shape)
                if fault is not None:
                    raise CheckpointError(
                        f"the table of {self.family.model_type} does not move {what} tensor {name} "
                        f"of shape {list(shape)} exactly once: {fault}"
                    )


def table_for(config: dict[str, Any]) -> ModelTable:
    """The table of the model that this config.json describes; ConfigError if it is not supported."""
    family = family_for(config)
    table = ModelTable(config, family, spec_for(config, family))
    table.prove_coverage()
    return table
