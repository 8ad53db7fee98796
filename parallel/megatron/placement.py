"""Where every parameter of this rank lies in the global model: the only place that maps parameter names.

A `Placed` parameter is a list of parts: rows (or, for columns, all) of the local tensor and the region of the global
tensor that they hold. Padded vocabulary rows belong to no part.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from torch import Tensor, nn

from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable
from mswift.converters.rule import MTP_LAYERS
from mswift.converters.spec import ModelSpec
from mswift.topology import ParallelDims

_LAYER = re.compile(r"(decoder\.|mtp\.)layers\.(\d+)\.(transformer_layer\.)?(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_RENAMED = {  # the PyTorch layer keeps its norms apart; checkpoints name them as Transformer Engine's fused layer does
    "input_layernorm.weight": tuple(
        f"{linear}.layer_norm_weight"
        for linear in ("self_attention.linear_qkv", "self_attention.in_proj", "mixer.in_proj")
    ),
    "input_layernorm.bias": ("self_attention.linear_qkv.layer_norm_bias",),
    "pre_mlp_layernorm.weight": ("mlp.linear_fc1.layer_norm_weight",),
    "pre_mlp_layernorm.bias": ("mlp.linear_fc1.layer_norm_bias",),
    "self_attn_bda.post_layernorm.weight": ("self_attention.linear_proj.post_layernorm.weight",),
    "mlp_bda.post_layernorm.weight": ("mlp.linear_fc2.post_layernorm.weight",),
    "decoder.final_layernorm.weight": ("decoder.final_norm.weight",),
}
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Part:
    """Rows `first_row` .. of the local parameter hold `region` of the global tensor `key` of that shape."""

    first_row: int
    region: Region
    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Placed:
    """A parameter (or buffer) and its place.

    is_primary: this rank, and no other of its tensor-parallel group and no other pipeline stage, answers for it
    (replicated parameters and the second copy of an embedding are the others'). What is frozen before adapters are
    added counts as a buffer. A buffer's primary rank is one of the data-parallel ranks as well, since no optimizer
    shares it out. key: of the global tensor, or of the first one, if checkpoints have the parameter in slices.
    """

    key: str
    parameter: Tensor
    parts: tuple[Part, ...]
    is_primary: bool
    is_buffer: bool = False
    is_expert: bool = False

    def sources(self, table: ModelTable) -> frozenset[str]:
        """The HF tensors that make it."""
        pieces = (piece for part in self.parts for piece in table.pieces_in(part.key, part.region))
        return frozenset(piece.names[0] for piece in pieces)


@dataclass(frozen=True)
class RankPlace:
    """This rank's place on the axes that cut parameters: (rank, size) of tensor parallelism, and of that of experts.

    first_expert: global number of local expert 0; is_first_replica: data-parallel rank 0 (of experts: of theirs).
    """

    tp: tuple[int, int]
    etp: tuple[int, int] = (0, 1)
    first_expert: int = 0
    is_first_replica: bool = True
    is_first_expert_replica: bool = True

    @staticmethod
    def of(dims: ParallelDims, rank: int, spec: ModelSpec) -> "RankPlace":
        """Of one rank of a layout."""
        num_experts = spec.moe.num_experts if spec.moe else 0
        here, sizes = dims.coordinate(rank), dims.sizes
        etp, ep, edp = (dims.members(axis, rank).index(rank) for axis in ("etp", "ep", "edp"))
        first_expert, is_first = ep * (num_experts // dims.ep), here.dp == 0 and here.cp == 0
        return RankPlace((here.tp, dims.tp), (etp, sizes["etp"]), first_expert, is_first, edp == 0)


class Name(NamedTuple):
    """A parameter's name in checkpoints, `prefix` ("decoder.layers.") + `rest`, its layer and expert in the chunk."""

    prefix: str
    rest: str
    layer: int | None = None
    expert: int | None = None

    @property
    def key(self) -> str:
        """The whole name, of a layer's parameter without a number."""
        return self.prefix + self.rest

    @property
    def is_ahead(self) -> bool:
        """Whether it is of a multi-token-prediction layer; these follow the last decoder layer."""
        return self.prefix.startswith(MTP_LAYERS)


def megatron_name(name: str) -> Name:
    """Of a parameter inside a chunk; norms keep the names of the modules."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return Name("", name)
    prefix, expert = f"{layer[1]}layers.{layer[3] or ''}", _EXPERT.fullmatch(layer[4])
    if expert is None:
        return Name(prefix, layer[4], int(layer[2]))
    return Name(prefix, f"mlp.experts.experts.{expert[2]}", int(layer[2]), int(expert[1]))


def place_chunks(chunks: Sequence[nn.Module], table: ModelTable, dims: ParallelDims, rank: int) -> list[Placed]:
    """Every parameter and buffer of the chunks of one rank."""
    spec, stage = table.spec, dims.coordinate(rank).pp
    place = RankPlace.of(dims, rank, spec)
    return [
        placed
        for number, chunk in enumerate(chunks)
        for placed in place_parameters(chunk, table, place, dims.stage_layers(spec.num_layers, stage, number))
    ]


def place_parameters(chunk: nn.Module, table: ModelTable, place: RankPlace, layers: range) -> Iterator[Placed]:
    """Every parameter and buffer of a chunk that holds the global `layers`. To be called before adapters are added."""
    is_first = getattr(chunk, "pre_process", True)
    for name, parameter in chain(chunk.named_parameters(), chunk.named_buffers()):
        found = megatron_name(name)
        layer = found.layer
        if layer is not None:
            layer = table.spec.num_layers + layer if found.is_ahead else layers[layer]
        is_tied = name == OUTPUT and table.spec.tied_embeddings
        copied = is_tied or (name == EMBEDDING and not is_first)  # for predictions, on the last stage
        keys = _stored_keys(table, Name("", EMBEDDING) if is_tied else found, layer)
        expert = None if found.expert is None else place.first_expert + found.expert
        tp_rank, tp_size = place.tp if expert is None else place.etp
        regions = [
            (key, region)
            for key in keys
            for region in table.shard(key, tp_rank, tp_size, layer if table.megatron[key].stacked else None, expert)
        ]
        is_buffer = not (isinstance(parameter, nn.Parameter) and parameter.requires_grad)
        is_cut = getattr(parameter, "tensor_model_parallel", False)
        is_first_replica = place.is_first_replica if expert is None else place.is_first_expert_replica
        is_primary = not copied and (is_cut or tp_rank == 0) and (is_first_replica or not is_buffer)
        parts = _parts(regions, tuple(parameter.shape), table)
        yield Placed(keys[0], parameter, parts, is_primary, is_buffer, expert is not None)


def _stored_keys(table: ModelTable, name: Name, layer: int | None) -> tuple[str, ...]:
    """The key of the parameter in checkpoints of this model, or those of its slices, whichever name it has there."""
    rest = name.rest
    spellings = (rest, *_RENAMED.get(rest, ()), rest.replace("self_attention.", "mixer."))
    keys = [table.key(name.prefix + spelling, layer) for spelling in spellings]
    found = next((key for key in keys if key in table.megatron or key in table.slices), keys[0])
    return table.slices.get(found, (found,))


def place_adapter(
    name: str, shape: Sequence[int], regions: Sequence[Region], is_expert: bool, parameter: Tensor, place: RankPlace
) -> Placed:
    """One tensor of an adapter run (`mswift.parallel.adapters.adapter_tensors`)."""
    is_cut = getattr(parameter, "tensor_model_parallel", False)
    is_copy = getattr(parameter, "shared", False)
    key, parts, row = f"adapter.{name}", [], 0
    for region in regions:
        parts.append(Part(row, region, key, tuple(shape)))
        row += region.sizes[0]
    is_buffer = not isinstance(parameter, nn.Parameter)
    is_primary = not is_copy and (is_cut or place.tp[0] == 0) and (place.is_first_replica or not is_buffer)
    return Placed(key, parameter, tuple(parts), is_primary, is_buffer, is_expert)


def _parts(regions: Sequence[tuple[str, Region]], local: tuple[int, ...], table: ModelTable) -> tuple[Part, ...]:
    """Lay regions one after the other along axis 0 of the local tensor."""
    parts, row = [], 0
    for key, region in regions:
        sizes = region.sizes[table.megatron[key].num_lead_axes :]
        assert sizes[1:] == local[1:], (region, local)
        parts.append(Part(row, region, key, table.megatron[key].shape))
        row += sizes[0]
    assert row <= local[0], (regions, local)
    return tuple(parts)
