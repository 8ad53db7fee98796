"""Adapters in Megatron-Bridge's torch_dist layouts, read as PEFT's tensors, bit for bit.

See `bridge` for the keys and `fused` for the arithmetic, of which there is none.
"""

import json
from pathlib import Path

import numpy as np

from mswift.converters.catalog import read_config
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Region
from mswift.converters.manifest import read_manifest
from mswift.converters.plan import table_for
from mswift.errors import CheckpointError
from mswift.tuners.arrays import Bits, read_bits
from mswift.tuners.bridge import Slot, read_run_config, slots
from mswift.tuners.detect import HF_FOLDER, MARK, layout_of
from mswift.tuners.fused import Pair
from mswift.tuners.peft_config import CONFIG_FILE, parse_peft_config, peft_config
from mswift.tuners.settings import PeftSettings
from mswift.tuners.sources import BASE_CONFIG, AdapterFiles, check_tensors, find_base, side_files

STACKED = ", stacked"
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


def format_name(layout: str, stack: bool) -> str:
    """How a manifest names the layout; it is read back from there."""
    return f"torch_dist (Megatron-Bridge, {layout}{STACKED if stack else ''})"


def open_bridge(path: Path, base_model: str | None) -> AdapterFiles:
    """An adapter that Megatron-Bridge has written, or `mswift convert --adapter_layout`.

    Base weights and optimizer state beside it are left alone. Of a foreign one the configuration is made from its
    run_config.yaml. CheckpointError for tensors that have no place, and for rows in an order that is not known.
    """
    source, folder = TorchDistSource(path), path / HF_FOLDER
    layout = layout_of(list(source.tensors))
    assert layout is not None
    in_folder = base_model is None and (folder / BASE_CONFIG).is_file()
    base = folder if in_folder else find_base(path, None, base_model)
    table = table_for(read_config(base))
    present = [slot for slot in slots(table, layout) if slot.key_a in source.tensors]
    known = {key for slot in present for key in (slot.key_a, slot.key_b, slot.key_magnitude)}
    extra = [key for key in source.tensors if MARK in key and not key.startswith("optimizer.") and key not in known]
    if extra:
        raise CheckpointError(f"{path}: {extra[0]} has no place in this adapter ({len(extra)} such tensors)")
    manifest = read_manifest(path)
    ours = manifest is not None and (folder / CONFIG_FILE).is_file()
    config = (folder / CONFIG_FILE).read_bytes() if ours else _foreign_config(path, layout, present, source, base_model)
    settings = parse_peft_config(json.loads(config), (folder if ours else path) / CONFIG_FILE)
    for slot in present:
        _check_order(path, source, slot, settings, layout)
    stack = manifest is not None and ours and STACKED in manifest.format
    reader = _Reader(path, source, settings, [(s, n) for s in present for n in s.layers(table)], stack)
    files = AdapterFiles(
        path,
        format_name(layout, stack),
        table,
        settings,
        config,
        (base / BASE_CONFIG).read_bytes(),
        reader.tensors(),
        reader.read,
        side_files(folder) if folder.is_dir() else [],
    )
    check_tensors(files)
    return files


def _foreign_config(
    path: Path, layout: str, present: list[Slot], source: TorchDistSource, base_model: str | None
) -> bytes:
    """An adapter_config.json for what Megatron-Bridge trained."""
    run = read_run_config(path)
    for slot in present:
        rank = source.tensors[slot.key_a].shape[-2]
        if rank != run.rank:
            raise CheckpointError(f"{path}: {slot.key_a} has rank {rank}, the run configuration says dim {run.rank}")
    members = [name for slot in present for name in slot.fusion.members(slot.tensor.layer or 0)]
    targets = tuple(dict.fromkeys(name.rpartition(".")[2] for name in members))
    content = peft_config(
        PeftSettings(rank=run.rank, alpha=run.alpha, target_modules=targets), (), base_model=base_model, tied=False
    )
    content |= {"lora_dropout": run.dropout, "use_dora": run.dora}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _check_order(path: Path, source: TorchDistSource, slot: Slot, settings: PeftSettings, layout: str) -> None:
    """CheckpointError where the order of rows depends on the tensor-parallel size, and that is not one."""
    key = slot.key_magnitude if layout == "fused" else slot.key_b
    if not slot.halved or (layout == "fused" and not settings.dora) or key not in source.tensors:
        return
    lead = 1 if slot.tensor.stacked else 0
    whole = Region.full(source.tensors[key].shape)
    cuts = len({chunk.offsets[lead] for chunk, _ in source.chunks(key).overlapping(whole)})
    if cuts > (1 if layout == "fused" else 2):
        raise CheckpointError(
            f"{path}: {key} was written by several tensor-parallel ranks ({cuts} pieces along its rows), whose rows "
            "Megatron-Bridge does not put in the order of the weight; save it there at tensor parallel size 1 first"
        )


class _Reader:
    """The tensors of PEFT's linears, split from the fused ones layer by layer; keeps the newest."""

    def __init__(
        self,
        path: Path,
        source: TorchDistSource,
        settings: PeftSettings,
        places: list[tuple[Slot, int]],
        stack: bool,
    ) -> None:
        self._path, self._source, self._settings, self._stack = path, source, settings, stack
        self._place = {
            name: (slot, layer)
            for slot, layer in places
            for name in slot.fusion.members(layer)
            if settings.selects(name)
        }
        self._newest: tuple[str, int, dict[str, Pair]] | None = None

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape), of the first layer for all."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, (slot, layer) in self._place.items():
            pair = self._pairs(slot, layer)[name]
            parts = {A: (slot.key_a, pair.a), B: (slot.key_b, pair.b), MAGNITUDE: (slot.key_magnitude, pair.magnitude)}
            for suffix, (key, bits) in parts.items():
                if bits is not None:
                    found[name + suffix] = (self._source.tensors[key].dtype, bits.shape)
        return found

    def read(self, name: str, region: Region, out: memoryview) -> None:
        linear, suffix = next((name.removesuffix(s), s) for s in (A, B, MAGNITUDE) if name.endswith(s))
        pair = self._pairs(*self._place[linear])[linear]
        bits = {A: pair.a, B: pair.b, MAGNITUDE: pair.magnitude}[suffix]
        assert bits is not None
        index = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
        out.cast("B")[:] = np.ascontiguousarray(bits[index]).tobytes()

    def _pairs(self, slot: Slot, layer: int) -> dict[str, Pair]:
        if self._newest is None or self._newest[:2] != (slot.prefix, layer):
            self._newest = (slot.prefix, layer, self._split(slot, layer))
        return self._newest[2]

    def _split(self, slot: Slot, layer: int) -> dict[str, Pair]:
        """One layer's pairs; CheckpointError if they do not make up the stored tensors exactly."""
        magnitude = self._layer(slot, slot.key_magnitude, layer) if self._settings.dora else None
        stored = Pair(self._layer(slot, slot.key_a, layer), self._layer(slot, slot.key_b, layer), magnitude)
        own, tensor_layer = slot.fusion.members(layer), layer
        ranks = {name: self._settings.rank_of(name) for name in own if name in self._place}
        room, rows = stored.a.shape[0], slot.fusion.rule.shape(slot.fusion.sizes)[0]
        if (sum if self._stack else max)(ranks.values()) > room or stored.b.shape != (rows, room):
            raise CheckpointError(
                f"{self._path}: {slot.key_a} and {slot.key_b} of layer {layer} have shapes {list(stored.a.shape)} and "
                f"{list(stored.b.shape)}; {CONFIG_FILE} and the base need {rows} rows and ranks {list(ranks.values())}"
            )
        pairs = slot.fusion.split(tensor_layer, stored, ranks, stack=self._stack)
        again = slot.fusion.fuse(tensor_layer, pairs, room, stack=self._stack)
        if not (np.array_equal(again.a, stored.a) and np.array_equal(again.b, stored.b)):
            raise CheckpointError(
                f"{self._path}: {slot.prefix} of layer {layer} holds more than the adapters that {HF_FOLDER}/"
                f"{CONFIG_FILE} describes: it was trained since mswift wrote it; remove mswift_manifest.json there to "
                f"convert it as what it is now, an adapter of rank {room}"
            )
        return pairs

    def _layer(self, slot: Slot, key: str, layer: int) -> Bits:
        if key not in self._source.tensors:
            raise CheckpointError(f"{self._path}: lacks {key}")
        tensor = self._source.tensors[key]
        whole = Region.full(tensor.shape)
        if not slot.tensor.stacked:
            return read_bits(self._source.read, key, tensor.dtype, whole)
        if layer >= tensor.shape[0]:
            raise CheckpointError(f"{self._path}: {key} has {tensor.shape[0]} layers, the base has more")
        region = Region((layer, *whole.offsets[1:]), (1, *whole.sizes[1:]))
        stacked = read_bits(self._source.read, key, tensor.dtype, region)
        return stacked.reshape(whole.sizes[1:])
