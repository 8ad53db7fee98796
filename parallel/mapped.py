"""A parameter as an engine holds it, in boxes of global tensors, both ways.

A `Mapped` parameter has maps whose side 0 is the whole parameter and whose side 1 are global tensors. A rank holds a
box of it; every box of a global tensor that this fills is a strided view of the rank's memory.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from mswift.converters.layout import Dim, Piece, Region, restrict
from mswift.errors import CheckpointError
from mswift.parallel.engine import Read, StateShard, bytes_of


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
