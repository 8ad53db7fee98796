"""Adapters in Megatron-Bridge's torch_dist layouts: read as PEFT's tensors, written from them, bit for bit.

One rank, one alpha and (fused) one A for all linears of a Megatron linear are what that layout can hold; what it
cannot is refused by name. See `bridge` for the keys and `fused` for the arithmetic, of which there is none.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mswift.converters.adapters import LoraConfig
from mswift.converters.catalog import read_config
from mswift.converters.io.torch_dist import ShardWriter, TorchDistSource
from mswift.converters.layout import Region
from mswift.converters.manifest import read_manifest
from mswift.converters.plan import table_for
from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.arrays import Bits, read_bits
from mswift.tuners.bridge import Slot, read_run_config, run_config, slots
from mswift.tuners.detect import HF_FOLDER, MARK, layout_of
from mswift.tuners.fused import Pair
from mswift.tuners.peft_config import CONFIG_FILE, parse_peft_config, peft_config
from mswift.tuners.settings import PeftSettings
from mswift.tuners.shapes import adapted_parameters
from mswift.tuners.sources import BASE_CONFIG, AdapterFiles, check_tensors, find_base, side_files

Layout = Literal["fused", "canonical"]
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
    content = peft_config(LoraConfig(run.rank, run.alpha, targets), (), base_model=base_model, tied=False)
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


@dataclass(frozen=True)
class BridgePlan:
    """What is to be written: (slot, layer, HF linears with an adapter there), at one rank and alpha."""

    layout: Layout
    stack: bool
    places: list[tuple[Slot, int, list[str]]]
    rank: int
    alpha: float
    config: bytes

    def keys(self) -> dict[str, str]:
        """PEFT name of a tensor -> key of the tensor that holds it."""
        parts = {A: "key_a", B: "key_b", MAGNITUDE: "key_magnitude"}
        return {
            name + suffix: getattr(slot, attribute)
            for slot, _, names in self.places
            for name in names
            for suffix, attribute in parts.items()
        }


def plan_bridge(files: AdapterFiles, layout: Layout, fuse: Literal["equal", "stack"]) -> BridgePlan:
    """Decides before anything is written; ConfigError names what the layout cannot hold."""
    settings, stack = files.settings, layout == "fused" and fuse == "stack"
    _refuse(files, layout)
    linears = {name.removesuffix(A) for name in files.tensors if name.endswith(A)}
    places = []
    for slot in slots(files.table, layout):
        adapted = {n: [m for m in slot.fusion.members(n) if m in linears] for n in slot.layers(files.table)}
        places += [(slot, layer, names) for layer, names in adapted.items() if names]
        if slot.tensor.stacked and any(adapted.values()) and not all(adapted.values()):
            missing = next(layer for layer, names in adapted.items() if not names)
            raise ConfigError(
                f"--adapter_layout {layout}: Megatron-Bridge keeps {slot.key_a} of all layers in one tensor, but "
                f"layer {missing} has no adapter there"
            )
        for layer, names in adapted.items():
            _check_slot(files, slot, layer, names, layout, stack)
    left = linears - {name for _, _, names in places for name in names}
    if left:
        raise ConfigError(f"--adapter_layout {layout}: no place for the adapter of {min(left)} ({len(left)} such)")
    rank = max((sum if stack else max)(settings.rank_of(n) for n in names) for _, _, names in places)
    (scale,) = {settings.scale_of(name) for name in linears}
    alpha = scale * rank
    if alpha / rank != scale:
        raise ConfigError(
            f"{settings.path}: the scale {scale!r} is no alpha / rank of rank {rank} (use_rslora={settings.rslora})"
        )
    targets = list(dict.fromkeys(slot.target for slot, _, _ in places))
    return BridgePlan(layout, stack, places, rank, alpha, run_config(layout, settings.dora, rank, alpha, targets))


def _refuse(files: AdapterFiles, layout: Layout) -> None:
    settings = files.settings
    scales = {settings.scale_of(n.removesuffix(A)) for n in files.tensors if n.endswith(A)}
    parameters = [parameter.name for parameter in adapted_parameters(files.table, settings).values()]
    experts = parameters or [n for n in files.tensors if ".experts." in n]
    for name, value in (
        ("modules_to_save", settings.modules_to_save),
        ("lora_bias", settings.lora_bias),
        ("use_dora", settings.dora and layout == "canonical"),
        ("alpha_pattern or rank_pattern", len(scales) > 1 and f"scales {sorted(scales)}"),
        ("target_parameters or target_modules", experts and f"experts or router ({experts[0]})"),
    ):
        if value:
            raise ConfigError(
                f"{settings.path}: {name}: Megatron-Bridge's {layout} adapters cannot hold {value!r} exactly"
            )


def _check_slot(files: AdapterFiles, slot: Slot, layer: int, names: list[str], layout: Layout, stack: bool) -> None:
    dora = files.settings.dora
    if slot.halved and names and (layout == "canonical" or dora):
        what = slot.key_magnitude if dora else slot.key_b
        raise ConfigError(
            f"--adapter_layout {layout}: Megatron-Bridge reads the rows of {what} in an order that depends on its "
            "tensor parallel size" + ("" if dora else "; --adapter_layout fused --fuse_adapters stack is exact")
        )
    if dora and names and len(names) < len(slot.fusion.members(layer)):
        raise ConfigError(
            f"{files.settings.path}: use_dora with {', '.join(names)} alone: a fused magnitude needs all of "
            f"{', '.join(slot.fusion.members(layer))}"
        )
    if not stack and len(names) > 1 and not slot.fusion.same_a(load_pairs(files, names)):
        leaves = ", ".join(name.rpartition(".")[2] for name in names)
        raise ConfigError(
            f"{files.path}: {leaves} of layer {layer} have different A, and Megatron-Bridge's LoRA has one for all of "
            f"{slot.target}: --fuse_adapters stack writes them exactly as one adapter of the sum of their ranks"
        )


def load_pairs(files: AdapterFiles, names: list[str]) -> dict[str, Pair]:
    """The adapters of some linears, as bits."""

    def load(name: str) -> Bits:
        dtype, shape = files.tensors[name]
        return read_bits(files.read, name, dtype, Region.full(shape))

    dora = files.settings.dora
    return {name: Pair(load(name + A), load(name + B), load(name + MAGNITUDE) if dora else None) for name in names}


def write_bridge(files: AdapterFiles, plan: BridgePlan, writer: ShardWriter) -> Iterator[tuple[str, bytes]]:
    """Writes the fused tensors; yields (PEFT name, its bytes) of every tensor that went into them.

    CheckpointError if what is written does not split into what was read: the proof of every layer.
    """
    for slot, layer, names in plan.places:
        pairs = load_pairs(files, names)
        fused = slot.fusion.fuse(layer, pairs, plan.rank, stack=plan.stack)
        ranks = {name: pair.a.shape[0] for name, pair in pairs.items()}
        again = slot.fusion.split(layer, fused, ranks, stack=plan.stack)
        for name, pair in pairs.items():
            for suffix, one, other in (
                (A, pair.a, again[name].a),
                (B, pair.b, again[name].b),
                (MAGNITUDE, pair.magnitude, again[name].magnitude),
            ):
                if one is None or other is None:
                    continue
                if not np.array_equal(one, other):
                    raise CheckpointError(f"{files.path}: {name}{suffix} does not come back from {slot.prefix}")
                yield name + suffix, one.tobytes()
        for key, suffix, bits in (
            (slot.key_a, A, fused.a),
            (slot.key_b, B, fused.b),
            (slot.key_magnitude, MAGNITUDE, fused.magnitude),
        ):
            if bits is not None:
                _add(writer, slot, layer, key, _one_dtype(files, names, suffix), bits, files)


def _one_dtype(files: AdapterFiles, names: list[str], suffix: str) -> str:
    dtypes: Mapping[str, str] = {name: files.tensors[name + suffix][0] for name in names}
    if len(set(dtypes.values())) > 1:
        raise ConfigError(f"{files.path}: one dtype is needed for adapters that share a tensor, not {dict(dtypes)}")
    return next(iter(dtypes.values()))


def _add(writer: ShardWriter, slot: Slot, layer: int, key: str, dtype: str, bits: Bits, files: AdapterFiles) -> None:
    data = memoryview(np.ascontiguousarray(bits).reshape(-1)).cast("B")
    if slot.tensor.stacked:
        shape = (files.table.spec.num_layers, *bits.shape)
        region = Region((layer, *(0 for _ in bits.shape)), (1, *bits.shape))
        writer.add(key, dtype, shape, region, data)
    else:
        writer.add(key, dtype, bits.shape, Region.full(bits.shape), data)
