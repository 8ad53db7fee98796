"""Adapters written in Megatron-Bridge's torch_dist layouts: decided before, proved while they are written.

One rank, one scale and (fused) one A for all linears of a Megatron linear are what that layout can hold; what it
cannot is refused by name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mswift.converters.io.torch_dist import ShardWriter
from mswift.converters.layout import Region
from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.arrays import Bits, read_bits
from mswift.tuners.bridge import Slot, run_config, slots
from mswift.tuners.bridge_source import MAGNITUDE, A, B
from mswift.tuners.fused import Pair
from mswift.tuners.shapes import adapted_parameters
from mswift.tuners.sources import AdapterFiles

Layout = Literal["fused", "canonical"]


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
