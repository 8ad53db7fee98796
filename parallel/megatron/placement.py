"""Where every parameter of this rank lies in the global model: the only place that maps parameter names.

A `Placed` parameter is a list of parts: rows (or, for columns, all) of the local tensor and the region of the global
tensor that they hold. Padded vocabulary rows belong to no part.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_RENAMED = {  # the PyTorch layer keeps its norms apart; checkpoints name them as Transformer Engine's fused layer does
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Part:
    """Rows `first_row` .. of the local parameter hold `region` of the global tensor."""

    first_row: int
    region: Region


@dataclass(frozen=True)
class Placed:
    """A parameter and its place. `is_primary`: this rank, and no other of its tensor-parallel group and no other

    pipeline stage, answers for it (replicated parameters and the second copy of a tied embedding are the others').
    """

    key: str
    shape: tuple[int, ...]
    parameter: nn.Parameter
    parts: tuple[Part, ...]
    is_primary: bool


def megatron_key(name: str) -> tuple[str, int | None]:
    """Parameter name inside a chunk -> (key in checkpoints, layer counted inside the chunk)."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name, None
    return "decoder.layers." + _RENAMED.get(match[2], match[2]), int(match[1])


def place_parameters(
    chunk: nn.Module, table: ModelTable, *, layers: range, tp_rank: int, tp_size: int
) -> Iterator[Placed]:
    """Every parameter of a chunk that holds the global `layers`. To be called before adapters are added."""
    for name, parameter in chunk.named_parameters():
        name, local = megatron_key(name)
        layer = None if local is None else layers[local]
        copied = name == OUTPUT and table.spec.tied_embeddings
        key = table.key(EMBEDDING if copied else name, layer)
        regions = table.shard(key, tp_rank, tp_size, layer if table.megatron[key].stacked else None)
        is_cut = getattr(parameter, "tensor_model_parallel", False)
        parts = _parts(regions, tuple(parameter.shape), lead=table.megatron[key].num_lead_axes)
        yield Placed(key, table.megatron[key].shape, parameter, parts, not copied and (is_cut or tp_rank == 0))


def place_adapter(name: str, shape: Sequence[int], region: Region, parameter: nn.Parameter, tp_rank: int) -> Placed:
    """One trained parameter of an adapter run (`mswift.parallel.adapters.adapter_tensors`)."""
    is_cut = getattr(parameter, "tensor_model_parallel", False)
    is_copy = getattr(parameter, "shared", False)
    parts = (Part(0, region),) if region.num_elements else ()
    return Placed(f"adapter.{name}", tuple(shape), parameter, parts, not is_copy and (is_cut or tp_rank == 0))


def _parts(regions: Sequence[Region], local: tuple[int, ...], *, lead: int) -> tuple[Part, ...]:
    """Lay regions one after the other along axis 0 of the local tensor."""
    parts, row = [], 0
    for region in regions:
        sizes = region.sizes[lead:]
        assert sizes[1:] == local[1:], (region, local)
        parts.append(Part(row, region))
        row += sizes[0]
    assert row <= local[0], (regions, local)
    return tuple(parts)
