"""A PEFT directory from the adapters of a training checkpoint, or from any named arrays. Bytes move; no torch."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial as partial_of
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from mswift import rundir
from mswift.converters.adapters import trained_name
from mswift.converters.catalog import read_config
from mswift.converters.io.files import new_directory, write_file
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Region
from mswift.converters.plan import DTYPE_BYTES, ModelTable, table_for
from mswift.errors import CheckpointError
from mswift.tuners.files import row_blocks, write_safetensors
from mswift.tuners.hidden import is_hidden
from mswift.tuners.method import place_of
from mswift.tuners.other_adapters import parse_other
from mswift.tuners.peft_config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_peft_config,
)
from mswift.tuners.plain import as_plain, joined
from mswift.tuners.settings import PeftSettings
from mswift.tuners.shapes import adapter_table, promised_shapes
from mswift.tuners.xlora_files import directory_configs

STORED = "adapter."
"""Prefix of adapter tensors in training checkpoints; what follows is the PEFT name."""

T = TypeVar("T")
Read = Callable[[str, Region, memoryview], None]
"""Fills a buffer with the C-order bytes of a region of a named tensor."""


@dataclass(frozen=True)
class AdapterReport:
    """What was written; prints as one sentence."""

    destination: Path
    num_tensors: int
    num_elements: int
    kind: str = "PEFT adapter"

    def __str__(self) -> str:
        size = f"{self.num_tensors} tensors, {self.num_elements:,} elements"
        return f"{self.kind} written to {self.destination}: {size}"


def is_adapter_checkpoint(checkpoint: Path) -> bool:
    """Whether a checkpoint holds adapters in place of a model."""
    return (checkpoint / "hf" / CONFIG_FILE).is_file()


def tuner_of(checkpoint: Path) -> str:
    """The --tuner_type of the run that wrote an adapter's checkpoint."""
    content = json.loads((checkpoint / rundir.HF_FILES / CONFIG_FILE).read_text(encoding="utf-8"))
    return str(content.get("peft_type", "LORA")).lower()


def export_adapter(checkpoint: Path, destination: Path) -> AdapterReport:
    """The adapter of a checkpoint as PEFT loads it, in the dtype it was trained in.

    Raises CheckpointError unless the checkpoint holds exactly the tensors its adapter_config.json promises.
    """
    if tuner_of(checkpoint) != "lora":
        return _export_method(checkpoint, destination)
    settings = read_peft_config(checkpoint / "hf", trained_here=True)
    source = TorchDistSource(checkpoint)
    tensors = stored_tensors(source)
    table = adapter_table(table_for(read_config(checkpoint / "hf")), tensors)
    config = (checkpoint / "hf" / CONFIG_FILE).read_bytes()

    def read(name: str, region: Region, out: memoryview) -> None:
        read_rows(source, name, region, out)

    reader: Read = read
    if settings.starts_in_weight:
        settings, config = as_plain(settings, config)
        tensors, reader = joined(tensors, read)
    beside = _tokenizer_files(checkpoint)
    return write_adapter(destination, table, settings, config, tensors, reader, where=str(checkpoint), beside=beside)


def _export_method(checkpoint: Path, destination: Path) -> AdapterReport:
    """The adapter of another method: its bytes as they are."""
    config = (checkpoint / rundir.HF_FILES / CONFIG_FILE).read_bytes()
    source = TorchDistSource(checkpoint)
    table = table_for(read_config(checkpoint / rundir.HF_FILES))
    path = checkpoint / rundir.HF_FILES / CONFIG_FILE
    adapter, saved = parse_other(json.loads(config), path, table.spec.num_layers)
    stored = {name.removeprefix(STORED): info for name, info in source.tensors.items() if name.startswith(STORED)}
    shapes = adapter.file_shapes(table, saved)
    left = adapter.trained_shapes(table).keys() - shapes.keys()  # a network, of which the file has what it made
    tensors = {name: (info.dtype, tuple(info.shape)) for name, info in stored.items() if name not in left}

    def read(name: str, region: Region, out: memoryview) -> None:
        source.read(STORED + name, region, out)

    beside = _tokenizer_files(checkpoint)
    return write_tensors(destination, table, shapes, config, tensors, read, where=str(checkpoint), beside=beside)


def stored_tensors(source: TorchDistSource) -> dict[str, tuple[str, tuple[int, ...]]]:
    """PEFT name -> (dtype, PEFT's shape) of the adapter in a training checkpoint.

    B of stacked experts is [out, rank, expert] there, so that the part of one expert is a box; PEFT has no third axis.
    """
    stored = {name.removeprefix(STORED): info for name, info in source.tensors.items() if name.startswith(STORED)}
    return {name: (info.dtype, (*info.shape[:1], *_joined(info.shape[1:]))) for name, info in stored.items()}


def _joined(width: Sequence[int]) -> tuple[int, ...]:
    return (prod(width),) if width else ()


def read_rows(source: TorchDistSource, name: str, region: Region, out: memoryview) -> None:
    """Whole rows of a tensor of `stored_tensors`."""
    shape = source.tensors[STORED + name].shape
    assert region.sizes[1:] == _joined(shape[1:]), region
    source.read(STORED + name, Region((region.offsets[0], *(0 for _ in shape[1:])), (region.sizes[0], *shape[1:])), out)


def _tokenizer_files(checkpoint: Path) -> dict[str, bytes]:
    """Of a run with new tokens or another chat template: the adapter means nothing without them. {} for others."""
    run = json.loads((checkpoint / rundir.STATE).read_text(encoding="utf-8"))
    files = [file for file in sorted((checkpoint / rundir.HF_FILES).iterdir()) if file.is_file()]
    return {name: read() for name, read in beside_adapter(run.get("config", {}), {f.name: f.read_bytes for f in files})}


def beside_adapter(config: Mapping[str, Any], files: Mapping[str, T]) -> Iterator[tuple[str, T]]:
    """Of the files of a run's checkpoint those that lie beside its adapter, which means nothing without them.

    config: the run's; with new tokens or another chat template its tokenizer, else none.
    """
    if any(config.get(flag) for flag in ("new_special_tokens", "chat_template")):
        left_out = (CONFIG_FILE, "config.json", "generation_config.json")
        yield from ((name, file) for name, file in files.items() if name not in left_out)


def write_adapter(
    destination: Path,
    table: ModelTable,
    settings: PeftSettings,
    config: bytes,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Read,
    *,
    where: str,
    beside: Mapping[str, bytes] | None = None,
) -> AdapterReport:
    """adapter_model.safetensors and adapter_config.json (`config`, of which `settings` is the reading), atomically.

    beside: other files that belong there.

    tensors: trained name -> (dtype, shape), a tied embedding once; `where` names their origin in errors. A tied
    embedding is written under both of its names.
    """
    shapes = promised_shapes(table, settings)
    return write_tensors(destination, table, shapes, config, tensors, read, where=where, beside=beside)


def write_tensors(
    destination: Path,
    table: ModelTable,
    shapes: Mapping[str, tuple[int, ...]],
    config: bytes,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Read,
    *,
    where: str,
    beside: Mapping[str, bytes] | None = None,
) -> AdapterReport:
    """As `write_adapter`; `shapes`: what the file is to hold, by name without `base_model.model.`."""
    _check(where, tensors, {trained_name(table, name): shape for name, shape in shapes.items()})
    names: dict[str, dict[str, str]] = {}
    written: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        folder, full = place_of(name)
        names.setdefault(folder, {})[full] = trained_name(table, name)
        written.setdefault(folder, {})[full] = (tensors[trained_name(table, name)][0], shape)

    def blocks(folder: str, name: str) -> Iterator[bytearray]:
        dtype, shape = written[folder][name]
        for region in row_blocks(shape, DTYPE_BYTES[dtype]):
            buffer = bytearray(region.num_elements * DTYPE_BYTES[dtype])
            read(names[folder][name], region, memoryview(buffer))
            yield buffer

    with new_directory(destination) as partial:
        for folder in written:
            (partial / folder).mkdir(exist_ok=True)
            file = partial / folder / WEIGHTS_FILE
            write_safetensors(file, dict(sorted(written[folder].items())), partial_of(blocks, folder))
        for name, data in {**directory_configs(config, destination), **(beside or {})}.items():
            write_file(partial / name, data)
    own = {"kind": "adapter of mswift's own"} if is_hidden(json.loads(config)) else {}
    return AdapterReport(destination, len(shapes), sum(prod(shape) for shape in shapes.values()), **own)


def _check(
    where: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{where} lacks the adapter tensor {name} {list(shape)}")
        if tensors[name][1] != shape:
            raise CheckpointError(f"{where}: {name} has shape {list(tensors[name][1])}, the model needs {list(shape)}")
    extra = sorted(tensors.keys() - expected.keys())
    if extra:
        raise CheckpointError(f"{where}: {extra[0]} {list(tensors[extra[0]][1])} has no place in this adapter")
