"""The weights of a live Megatron engine as Hugging Face tensors, one after the other, at any layout.

All ranks call; rank 0 gets the tensors, each in the engine's dtype, bit for bit what an export would write. A part at a
time is gathered: one Megatron tensor of one layer. Import after `mswift.parallel.device.prepare`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mswift.converters.layout import Piece, Region
from mswift.converters.plan import ModelTable
from mswift.errors import LayoutError
from mswift.parallel.megatron.engine import MegatronEngine, StateShard
from mswift.parallel.megatron.state import bytes_of
from mswift.train.collective import gather_objects, gather_on_first
from mswift.tuners.export import STORED, AdapterReport, write_adapter
from mswift.tuners.peft_config import parse_peft_config, peft_config

Unit = tuple[str, int | None]
"""A Megatron tensor, and which layer of it (None: it has no layers)."""
Named = tuple[str, Tensor]


def hf_tensors(engine: MegatronEngine) -> Iterator[Named]:
    """(name, tensor) of the whole model on rank 0, in the order of files; none on the others, which must iterate too.

    A tied head is not among them. Raises LayoutError where the ranks do not hold every element once, ConfigError for
    an adapter run, whose base does not change (`write_live_adapter`).
    """
    assert engine.config.lora is None, "an adapter run sends its adapter"
    table = engine.table
    mine: dict[Unit, list[StateShard]] = {}
    for shard in engine.model_shards():
        mine.setdefault(_unit(table, shard), []).append(shard)
    units = sorted({unit for units in gather_objects(list(mine)) for unit in units}, key=_order(table))
    growing = _Growing(table)
    for unit in units:
        parts = gather_on_first([(shard.region, shard.tensor.cpu()) for shard in mine.get(unit, ())])
        if parts:
            yield from growing.add(unit, [part for rank in parts for part in rank])
    growing.check_all_given()


def _unit(table: ModelTable, shard: StateShard) -> Unit:
    return shard.key, shard.region.offsets[0] if table.megatron[shard.key].stacked else None


def _order(table: ModelTable) -> "_Order":
    return _Order({name: place for place, name in enumerate(table.hf_order)}, table)


class _Order:
    """Units by the first of their HF tensors."""

    def __init__(self, places: Mapping[str, int], table: ModelTable) -> None:
        self._places, self._table = places, table

    def __call__(self, unit: Unit) -> int:
        return min(self._places[piece.names[0]] for piece in _pieces(self._table, unit))


def _pieces(table: ModelTable, unit: Unit) -> list[Piece]:
    key, layer = unit
    return table.pieces(key, None if layer is None else range(layer, layer + 1))


class _Growing:
    """HF tensors that are being put together; each is given out as soon as it is whole."""

    def __init__(self, table: ModelTable) -> None:
        self._table = table
        self._tensors: dict[str, Tensor] = {}
        self._left: dict[str, int] = {}
        self._given = 0

    def add(self, unit: Unit, parts: Sequence[tuple[Region, Tensor]]) -> Iterator[Named]:
        """Take one unit; the tensors that it completes."""
        whole = self._assemble(unit, parts)
        for piece in _pieces(self._table, unit):
            name = piece.names[0]
            shape = self._table.hf[name]
            if name not in self._tensors:
                self._tensors[name] = torch.empty(shape, dtype=whole.dtype)
                self._left[name] = self._tensors[name].numel()
            target, source = _view(self._tensors[name], piece, 0), _view(whole, piece, 1, unit[1])
            target.copy_(source)
            self._left[name] -= source.numel()
            if self._left[name] == 0:
                self._given += 1
                yield name, self._tensors.pop(name)

    def _assemble(self, unit: Unit, parts: Sequence[tuple[Region, Tensor]]) -> Tensor:
        """One layer [1, ...] of the Megatron tensor, or all of one without layers; LayoutError unless tiled once."""
        key, layer = unit
        shape = self._table.megatron[key].shape
        shape = shape if layer is None else (1, *shape[1:])
        whole = torch.empty(shape, dtype=parts[0][1].dtype)
        counts = torch.zeros(shape, dtype=torch.int8)
        for region, values in parts:
            lead = region.offsets[0] if layer is None else 0
            offsets = (lead, *region.offsets[1:])
            box = tuple(slice(o, o + s) for o, s in zip(offsets, region.sizes, strict=True))
            whole[box] = values.view(region.sizes)
            counts[box] += 1
        if not bool((counts == 1).all()):
            raise LayoutError(
                f"{key}: its elements are on {int(counts.min())} to {int(counts.max())} ranks; each must be on one"
            )
        return whole

    def check_all_given(self) -> None:
        """LayoutError where tensors are incomplete."""
        if self._left and any(self._left.values()):
            raise LayoutError(f"not all elements came of {', '.join(self._tensors)}")


def _view(tensor: Tensor, piece: Piece, side: int, layer: int | None = None) -> Tensor:
    """What the piece touches of a tensor; layer: the one that a stacked tensor was cut down to."""
    starts = list(piece.starts[side])
    if layer is not None:
        starts[0] -= layer
    strides = [tensor.stride(dim.axis[side]) * dim.step[side] for dim in piece.dims]
    offset = sum(start * tensor.stride(axis) for axis, start in enumerate(starts))
    return tensor.as_strided([dim.size for dim in piece.dims], strides, offset)


def write_live_adapter(engine: MegatronEngine, destination: Path) -> AdapterReport | None:
    """The adapter of a live engine as PEFT loads it, written by rank 0; None on the others, which must call too.

    Of PiSSA and OLoRA, which start from a part of the weight, it is what PEFT calls such an adapter before conversion:
    ConfigError; export a checkpoint.
    """
    lora = engine.config.lora
    assert lora is not None, "a full run sends its weights"
    parts = gather_on_first([(s.key, s.shape, s.region, s.tensor.cpu()) for s in engine.model_shards()])
    if not parts:
        return None
    arrays: dict[str, Tensor] = {}
    for key, shape, region, values in (part for rank in parts for part in rank):
        whole = arrays.setdefault(key.removeprefix(STORED), torch.empty(shape, dtype=values.dtype))
        whole[tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))] = values.view(
            region.sizes
        )
    matrices = {name: array.flatten(1) if array.dim() > 1 else array for name, array in arrays.items()}
    table, saved = lora.own_table(engine.table), engine.config.trainable_modules
    content = peft_config(lora.settings, saved, base_model=None, tied=table.spec.tied_embeddings)
    settings = parse_peft_config(content, destination / "adapter_config.json")

    def read(name: str, region: Region, out: memoryview) -> None:
        box = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
        out[:] = bytes_of(matrices[name][box].contiguous())

    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    tensors = {name: (names[array.dtype], tuple(array.shape)) for name, array in matrices.items()}
    config = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    return write_adapter(destination, table, settings, config, tensors, read, where="the live adapter")
