"""A family table applied to one config.json, and the proof that it moves every element exactly once."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from mswift.converters.catalog import family_for, spec_for
from mswift.converters.coverage import prove_coverage
from mswift.converters.family import Family, features_of, holds, sizes_of
from mswift.converters.layout import Piece, Region
from mswift.converters.megatron_tensor import MegatronTensor
from mswift.converters.rule import LAYERS, MTP_LAYERS, Drop, Rule, size_of
from mswift.converters.spec import ModelSpec
from mswift.errors import CheckpointError
from mswift.topology import check_expert_tensor_parallel, check_tensor_parallel

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8,
    "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
}  # fmt: skip
"""Item size by safetensors' name of the dtype."""

WEIGHT_DTYPES = ("F32", "BF16", "F16")
"""Dtypes that a model's weights may have here."""

LARGEST_GRID = 8


EMBEDDING = "embedding.word_embeddings.weight"
"""Key of the input embedding."""


class ModelTable:
    """What `family_for(config)` says about the tensors of this very model, in one of the family's spellings."""

    def __init__(self, config: dict[str, Any], family: Family, spec: ModelSpec, spelling: str = "") -> None:
        self.config = config
        self.family = family
        self.spec = spec
        self.spelling = spelling or next(iter(family.spellings), "")
        self.sizes = sizes_of(spec)
        self._features = features_of(spec, None, self.spelling)
        self._layer_features = [
            features_of(spec, spec.layer(n), self.spelling) for n in range(spec.num_layers + len(spec.mtp_layers))
        ]
        megatron: dict[str, MegatronTensor] = {}
        for rule in family.table:
            if isinstance(rule, Rule):
                for tensor in self._tensors(rule):
                    megatron[tensor.key] = tensor
        self.megatron: Mapping[str, MegatronTensor] = megatron
        self.hf: Mapping[str, tuple[int, ...]]
        self.hf, self.expert_of, self._own_dtype = self._hf_tensors()
        self.dropped: Mapping[str, Drop] = {
            name: d for d in family.table if isinstance(d, Drop) for name in self._drop_names(d)
        }

    def _hf_tensors(self) -> tuple[dict[str, tuple[int, ...]], dict[str, int], set[str]]:
        """Shape of every HF tensor, its expert (-1: of none, or of all), the names with a dtype of their own."""
        shapes: dict[str, tuple[int, ...]] = {}
        expert_of: dict[str, int] = {}
        own_dtype: set[str] = set()
        for tensor in self.megatron.values():
            rule = tensor.rule
            experts = range(self.sizes["experts"]) if rule.experts == "each" else range(-1, 0)
            for part in rule.parts:
                shape = rule.hf_shape(part, self.sizes)
                for name, expert in ((part.hf.format(l=n, e=e), e) for n in self._layers(tensor) for e in experts):
                    if shapes.setdefault(name, shape) != shape:
                        raise CheckpointError(f"{name}: the table gives it shapes {shapes[name]} and {shape}")
                    if expert_of.setdefault(name, expert) != expert:
                        raise CheckpointError(f"{name}: the table gives it to experts {expert_of[name]} and {expert}")
                    if rule.own_dtype:
                        own_dtype.add(name)
        return shapes, expert_of, own_dtype

    def _tensors(self, rule: Rule) -> Iterator[MegatronTensor]:
        """The Megatron tensors of a rule: one, one a layer, or none."""
        spec = self.spec
        first = spec.num_layers if rule.in_mtp else 0
        count = len(spec.mtp_layers) if rule.in_mtp else spec.num_layers
        if not (rule.in_layer or rule.in_mtp):
            if holds(rule.when, self._features):
                yield MegatronTensor(rule.megatron, self._shape(rule), rule)
            return
        layers = [n for n in range(first, first + count) if holds(rule.when, self._layer_features[n])]
        if rule.in_layer and spec.stacked and layers:
            yield MegatronTensor(rule.megatron, (spec.num_layers, *self._shape(rule)), rule, stacked=True)
            return
        prefix = MTP_LAYERS if rule.in_mtp else LAYERS
        for n in layers:
            key = f"{prefix}{n - first}.{rule.megatron.removeprefix(prefix)}"
            yield MegatronTensor(key, self._shape(rule), rule, layer=n)

    def _shape(self, rule: Rule) -> tuple[int, ...]:
        experts = (self.sizes["experts"],) if rule.experts else ()
        return (*experts, *rule.shape(self.sizes))

    def _drop_names(self, drop: Drop) -> Iterator[str]:
        if "{l}" not in drop.hf:
            if holds(drop.when, self._features):
                yield drop.hf
            return
        for layer, features in enumerate(self._layer_features):
            if holds(drop.when, features | ({"mtp_layer"} if layer >= self.spec.num_layers else set())):
                yield drop.hf.format(l=layer)

    @cached_property
    def hf_in_layers(self) -> frozenset[str]:
        """HF tensors of layers."""
        places = {name: self.megatron[pieces[0].names[1]] for name, pieces in self.hf_pieces.items()}
        return frozenset(name for name, tensor in places.items() if tensor.rule.in_layer)

    @cached_property
    def hf_embeddings(self) -> frozenset[str]:
        """HF tensors of the input embedding, which may be the output layer's too."""
        return frozenset(name for name, pieces in self.hf_pieces.items() if pieces[0].names[1] == EMBEDDING)

    def without_mtp(self) -> "ModelTable":
        """The table of the model without its multi-token-prediction layers."""
        return ModelTable(self.config, self.family, replace(self.spec, mtp_layers=()), self.spelling)

    @property
    def mtp_copies(self) -> dict[str, str]:
        """Tensors that published multi-token-prediction layers repeat: HF name -> the model's tensor with its bytes."""
        copies = {}
        for name, drop in self.dropped.items():
            if drop.when == "mtp_layer":
                original = drop.same_as
                while original in self.dropped:  # a tied head
                    original = self.dropped[original].same_as
                copies[name] = original
        return copies

    @property
    def mtp_names(self) -> set[str]:
        """HF names and Megatron keys of the multi-token-prediction layers."""
        keys = {key for key, tensor in self.megatron.items() if tensor.rule.in_mtp}
        return keys | {piece.names[0] for key in keys for piece in self.pieces(key)}

    @cached_property
    def slices(self) -> Mapping[str, tuple[str, ...]]:
        """Name of a parameter that checkpoints hold in slices (`<name>.z`, `<name>.x`) -> their keys, in its order."""
        found: dict[str, tuple[str, ...]] = {}
        for key in self.megatron:
            name = key.rpartition(".")[0]
            if name.endswith((".weight", ".bias")):
                found[name] = (*found.get(name, ()), key)
        return found

    def key(self, name: str, layer: int | None) -> str:
        """The key of a layer's tensor, given as "decoder.layers." + its rest; layer in HF's count."""
        if layer is None or name in self.megatron:
            return name
        prefix = LAYERS if name.startswith(LAYERS) else MTP_LAYERS
        number = layer if prefix == LAYERS else layer - self.spec.num_layers
        return f"{prefix}{number}.{name.removeprefix(prefix)}"

    def _layers(self, tensor: MegatronTensor) -> Sequence[int | None]:
        """HF numbers of the layers whose weights the tensor holds; None: of no layer."""
        return range(self.spec.num_layers) if tensor.stacked else (tensor.layer,)

    def pieces(self, key: str, layers: range | None = None, experts: range | None = None) -> list[Piece]:
        """Maps HF tensor -> Megatron tensor `key`; of some layers (of a stacked one) and experts, or (None) of all."""
        tensor = self.megatron[key]
        chosen = (experts or range(self.sizes["experts"])) if tensor.rule.experts else range(1)
        if not tensor.stacked:
            return tensor.rule.pieces(self.sizes, key, tensor.layer, (), chosen)
        over = range(self.spec.num_layers) if layers is None else layers
        return [piece for n in over for piece in tensor.rule.pieces(self.sizes, key, n, (n,), chosen)]

    def pieces_in(self, key: str, region: Region) -> list[Piece]:
        """Maps that may touch the region of the Megatron tensor."""
        tensor, axis = self.megatron[key], 0
        layers = experts = None
        if tensor.stacked:
            layers = range(region.offsets[0], region.offsets[0] + region.sizes[0])
            axis = 1
        if tensor.rule.experts == "each":
            experts = range(region.offsets[axis], region.offsets[axis] + region.sizes[axis])
        return self.pieces(key, layers, experts)

    @cached_property
    def hf_pieces(self) -> Mapping[str, tuple[Piece, ...]]:
        """HF name -> its maps (side 0) into Megatron tensors (side 1)."""
        found: dict[str, list[Piece]] = {}
        for key in self.megatron:
            for piece in self.pieces(key):
                found.setdefault(piece.names[0], []).append(piece)
        return {name: tuple(pieces) for name, pieces in found.items()}

    def has_own_dtype(self, name: str) -> bool:
        """Whether an HF tensor may have another dtype than the weights around it (a router's bias in fp32)."""
        return name in self._own_dtype

    @cached_property
    def hf_order(self) -> list[str]:
        """HF names as files hold them: what is before the layers, layer after layer, what is after."""
        order: dict[str, tuple[int, int, int]] = {}
        inside = False
        for rank, tensor in enumerate(self.megatron.values()):
            in_layers = tensor.rule.in_layer or tensor.rule.in_mtp
            inside = inside or in_layers
            experts = range(self.sizes["experts"]) if tensor.rule.experts == "each" else range(1)
            for layer in self._layers(tensor):
                place = (layer if layer is not None else -1) if in_layers else (1 << 30 if inside else -1)
                for expert in experts:
                    for part in tensor.rule.parts:
                        order.setdefault(part.hf.format(l=layer, e=expert), (place, expert, rank))
        return sorted(order, key=order.__getitem__)

    def shard(
        self, key: str, tp_rank: int, tp_size: int, layer: int | None = None, expert: int | None = None
    ) -> tuple[Region, ...]:
        """Regions of the global tensor whose concatenation along the cut axis is that rank's parameter.

        One region, or one per half of [gate; up]. Real vocabulary only: a rank's regions may hold fewer rows
        than its padded parameter, or be absent. A stacked key needs `layer`, one with experts `expert` (tp_rank and
        tp_size are then those of expert tensor parallelism); its regions have leading size 1.
        LayoutError if tp_size does not divide the unit that is cut.
        """
        tensor = self.megatron[key]
        cut = tensor.rule.cut
        if cut is not None and not cut.uneven and (units := size_of(cut.unit, self.sizes)) % tp_size:
            self._refuse_cut(key, tp_size, units)
        return tensor.shard(self.sizes, tp_rank, tp_size, layer, expert)

    def check_tp(self, tp_size: int) -> None:
        """LayoutError if that tensor-parallel size cuts what must stay whole; names sizes that work."""
        check_tensor_parallel(tp_size, self.spec.tensor_parallel_units)

    def _refuse_cut(self, key: str, tp_size: int, units: int) -> None:
        if self.megatron[key].rule.experts:
            check_expert_tensor_parallel(tp_size, units)
        self.check_tp(tp_size)
        raise AssertionError(f"{key}: {units} units do not divide by {tp_size}")

    def storage_grid(self, rule: Rule) -> int:
        """Chunks along the cut axis in files we write: the largest power of two up to 8 that fits.

        Experts are laid over ranks whole: one chunk each.
        """
        if rule.cut is None or rule.experts:
            return 1
        grid = LARGEST_GRID
        while not rule.cut.uneven and size_of(rule.cut.unit, self.sizes) % grid:
            grid //= 2
        return grid

    def storage_regions(self, key: str) -> list[Region]:
        """The chunks in which a converted checkpoint stores that tensor."""
        tensor = self.megatron[key]
        grid = self.storage_grid(tensor.rule)
        experts = range(self.sizes["experts"]) if tensor.rule.experts else (None,)
        return [
            region
            for layer in (range(self.spec.num_layers) if tensor.stacked else (None,))
            for expert in experts
            for rank in range(grid)
            for region in self.shard(key, rank, grid, layer, expert)
        ]

    def prove_coverage(self) -> None:
        """CheckpointError unless the rules consume every HF element and write every Megatron element once."""
        prove_coverage(self)


def table_for(config: dict[str, Any], stored: Collection[str] = ()) -> ModelTable:
    """The table of the model that this config.json describes; ConfigError if it is not supported.

    stored: the names of a checkpoint's tensors (HF names or Megatron keys), which decide between spellings of a
    family, and whether the multi-token-prediction layers of config.json are there: transformers leaves them out.
    """
    family = family_for(config)
    spec = spec_for(config, family)
    names = frozenset(stored)
    if names and not spec.mtp_layers:
        spec = replace(spec, mtp_layers=family.optional_mtp_layers)
    spellings = family.spellings if names else family.spellings[:1]
    tables = [ModelTable(config, family, spec, spelling) for spelling in spellings or ("",)]
    table = max(tables, key=lambda each: len(each.hf.keys() & names))
    if names and spec.mtp_layers and not table.mtp_names & names:
        table = table.without_mtp()
    table.prove_coverage()
    return table
