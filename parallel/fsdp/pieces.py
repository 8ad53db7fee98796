"""Where every parameter of a transformers model lies in the global tensors of the table, and what a rank has of it."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor

from mswift.converters.layout import Dim, Piece, Region
from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError
from mswift.parallel.mapped import Mapped

_STACKED = re.compile(r"(.+\.experts)\.(gate_up_proj|up_proj|down_proj)")
_OF_EXPERT = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Of an expert's tensors in files: as most models call them, and as Mixtral does."""
_BEGINNING = (r"^model\.", "backbone.")
_IN_FILES = ((r"^", ""), (r"\.mlp\.", ".block_sparse_moe."), _BEGINNING)
"""What transformers calls otherwise than files do, as pattern and words: Mixtral, Nemotron-H."""


def local(tensor: Tensor) -> Tensor:
    """This rank's rows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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


def name_in_files(name: str, table: ModelTable) -> str:
    """A parameter's name with the beginning that files give it, by which flags and `prefixes` of new blocks say it."""
    pattern, ours = _BEGINNING
    begins = any(stored.startswith(ours) for stored in table.hf)
    return re.sub(pattern, ours, name) if begins else name


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
