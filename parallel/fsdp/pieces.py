"""Where every parameter of a transformers model lies in the global tensors of the table, and the boxes of its shards.

A `Mapped` parameter has maps whose side 0 is the whole parameter and whose side 1 are global tensors. A rank holds some
of its rows; every box of a global tensor that these fill is a strided view of the rank's memory.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mswift.converters.layout import Dim, Piece, Region, restrict
from mswift.converters.plan import ModelTable
from mswift.errors import CheckpointError, ConfigError
from mswift.parallel.engine import Read, StateShard, bytes_of

_STACKED = re.compile(r"(.+\.experts)\.(gate_up_proj|up_proj|down_proj)")
_OF_EXPERT = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Of an expert's tensors in files: as most models call them, and as Mixtral does."""
_IN_FILES = ((r"^", ""), (r"\.mlp\.", ".block_sparse_moe."), (r"^model\.", "backbone."))
"""What transformers calls otherwise than files do, as pattern and words: Mixtral, Nemotron-H."""


def local(tensor: Tensor) -> Tensor:
    """This rank's rows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Mapped:
    """A parameter of the model: its name among transformers' weights, its whole shape, its maps.

    key and global_shape of the tensors on side 1 are in `shapes`.
    """

    name: str
    shape: tuple[int, ...]
    maps: tuple[Piece, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def key(self) -> str:
        """The first global tensor."""
        return self.maps[0].names[1]


def map_parameters(shapes: Mapping[str, tuple[int, ...]], table: ModelTable) -> dict[str, Mapped]:
    """Each parameter (name -> whole shape) of a model without adapters.

    ConfigError for a parameter that the table does not know, and for a tensor of the table that the model lacks.
    """
    found: dict[str, Mapped] = {}
    seen: set[str] = set()
    for name, shape in shapes.items():
        maps: tuple[Piece, ...] = ()
        for source, place in _sources(name, shape, table):
            seen.add(source)
            maps += tuple(_inside(piece, place, len(shape)) for piece in table.hf_pieces[source])
        own = {piece.names[1]: table.megatron[piece.names[1]].shape for piece in maps}
        found[name] = Mapped(name, shape, maps, own)
    missing = sorted(table.hf.keys() - seen)
    if missing:
        raise ConfigError(
            f"--backend fsdp: transformers' model has no parameter for {missing[0]} ({len(missing)} such tensors of "
            "the checkpoint): use --backend megatron"
        )
    return found


def _sources(name: str, shape: tuple[int, ...], table: ModelTable) -> list[tuple[str, tuple[int, ...]]]:
    """(tensor as files have it, where it begins in the parameter); transformers stacks the experts of a layer."""
    for ours, theirs in _IN_FILES:
        stored = re.sub(ours, theirs, name)
        if table.hf.get(stored) == shape:
            return [(stored, (0,) * len(shape))]
        if parts := _experts(stored, shape, table):
            return parts
    known = table.hf.get(name)
    raise ConfigError(
        f"--backend fsdp: transformers' parameter {name} {list(shape)} is "
        + (f"{list(known)} in the checkpoint" if known else "no tensor of the checkpoint")
        + ": use --backend megatron"
    )


def _experts(name: str, shape: tuple[int, ...], table: ModelTable) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors of single experts that a parameter [experts, rows, columns] stacks; none where it does not."""
    stacked = _STACKED.fullmatch(name)
    if stacked is None or len(shape) != 3:
        return []
    for names in _OF_EXPERT[stacked[2]]:
        rows = shape[1] // len(names)
        parts: list[tuple[str, tuple[int, ...]]] = [
            (f"{stacked[1]}.{expert}.{part}.weight", (expert, number * rows, 0))
            for expert in range(shape[0])
            for number, part in enumerate(names)
        ]
        if all(table.hf.get(part) == (rows, shape[2]) for part, _ in parts):
            return parts
    return []


def _inside(piece: Piece, place: tuple[int, ...], num_axes: int) -> Piece:
    """A map of a tensor as one of the parameter that holds the tensor at `place`."""
    lead = num_axes - len(piece.starts[0])
    start = (*place[:lead], *(p + s for p, s in zip(place[lead:], piece.starts[0], strict=True)))
    dims = tuple(Dim(d.size, (d.axis[0] + lead, d.axis[1]), d.step) for d in piece.dims)
    return Piece(piece.names, (start, piece.starts[1]), dims)


def whole(name: str, key: str, shape: tuple[int, ...]) -> Mapped:
    """A parameter that is a global tensor itself."""
    dims = tuple(Dim(size, (axis, axis), (1, 1)) for axis, size in enumerate(shape) if size != 1)
    start = (0,) * len(shape)
    return Mapped(name, shape, (Piece((name, key), (start, start), dims),), {key: shape})


@dataclass(frozen=True)
class View:
    """A box of a global tensor, and the strided view of a rank's rows that holds it."""

    key: str
    box: Region
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, rows: Tensor) -> Tensor:
        """The elements in the box's order; `rows` is contiguous."""
        return rows.as_strided(self.sizes, self.strides, rows.storage_offset() + self.offset)


def views(mapped: Mapped, rows: Region) -> Iterator[View]:
    """What `rows` of a parameter (a box of its first axis, all of the others) hold, box by box."""
    strides = [1]
    for size in reversed(rows.sizes[1:]):
        strides.insert(0, strides[0] * size)
    for piece in mapped.maps:
        for part in restrict(piece, rows, 0):
            for tight in _single_boxes(part):
                dims = sorted(tight.dims, key=lambda d: (d.axis[1], -d.step[1]))
                begin = zip(tight.starts[0], rows.offsets, strides, strict=True)
                yield View(
                    tight.names[1],
                    tight.hull(1),
                    tuple(d.size for d in dims),
                    tuple(d.step[0] * strides[d.axis[0]] for d in dims),
                    sum((start - first) * stride for start, first, stride in begin),
                )


def _single_boxes(piece: Piece) -> Iterator[Piece]:
    """The map in parts that each fill one box of side 1."""
    loose: list[Dim] = []
    for axis in range(len(piece.starts[1])):
        extent = 1
        for dim in sorted((d for d in piece.dims if d.axis[1] == axis), key=lambda d: d.step[1]):
            if dim.step[1] == extent:
                extent *= dim.size
            else:
                loose.append(dim)
    tight = tuple(dim for dim in piece.dims if dim not in loose)
    for index in product(*(range(dim.size) for dim in loose)):
        starts = [list(start) for start in piece.starts]
        for number, dim in zip(index, loose, strict=True):
            for side in (0, 1):
                starts[side][dim.axis[side]] += number * dim.step[side]
        yield Piece(piece.names, (tuple(starts[0]), tuple(starts[1])), tight)


def shards(mapped: Mapped, rows: Region, values: Tensor, prefix: str = "") -> Iterator[StateShard]:
    """Values of some rows of a parameter, [rows.sizes], as boxes of the global tensors."""
    for view in views(mapped, rows):
        tensor = view.of(values.contiguous()).contiguous()
        yield StateShard(prefix + view.key, mapped.shapes[view.key], view.box, tensor)


def read_rows(
    mapped: Mapped, rows: Region, values: Tensor, read: Read, prefix: str = "", dtype: torch.dtype | None = None
) -> None:
    """Fill `values` [rows.sizes], contiguous; `dtype` is what `read` delivers, if not that of `values`.

    Raises CheckpointError unless every element was set.
    """
    count = 0
    for view in views(mapped, rows):
        found = torch.empty(view.sizes, dtype=dtype or values.dtype)
        read(prefix + view.key, view.box, bytes_of(found))
        view.of(values).copy_(found)
        count += found.numel()
    if count != values.numel():
        raise CheckpointError(f"{prefix}{mapped.name}: {count} elements read for {values.numel()} of this rank")


class Box(NamedTuple):
    """A box of a parameter that a rank has, and where its elements begin among all that the rank has of it."""

    region: Region
    offset: int = 0

    def of(self, values: Tensor) -> Tensor:
        """[region.sizes], a view of what the rank has."""
        return values.view(-1)[self.offset : self.offset + self.region.num_elements].view(self.region.sizes)


def row_regions(shape: Sequence[int], first: int, count: int) -> Region:
    """`count` rows of a tensor of that shape from `first` on."""
    return Region((first, *(0 for _ in shape[1:])), (count, *shape[1:]))
