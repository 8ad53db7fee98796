"""plan -> execute -> prove: weights moved between formats, file to file, with bounded memory and no model."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from mswift.converters.destinations import Destination, HfDestination, MegatronDestination
from mswift.converters.io.files import PIECE_BYTES, new_directory
from mswift.converters.io.side_files import MANIFEST
from mswift.converters.io.strided import Read, cut, scatter
from mswift.converters.manifest import (
    DroppedRecord,
    FileRecord,
    Manifest,
    TensorRecord,
    hash_frame,
    hash_whole,
    read_manifest,
)
from mswift.converters.plan import DTYPE_BYTES
from mswift.converters.sources import Place, Source, SourceOptions, open_source
from mswift.converters.workers import Buffers, default_workers, early_writeback, progress_bar, run_all
from mswift.errors import CheckpointError

Format = Literal["megatron", "hf"]
MAX_SHARD_BYTES = 5_000_000_000
_DEFAULTS = SourceOptions()


@dataclass(frozen=True)
class Plan:
    """A conversion before any byte moves: the opened source, and what becomes of its tensors."""

    source: Source
    to: Format
    recorded: Manifest | None
    dropped: Mapping[str, DroppedRecord]

    @property
    def restored(self) -> dict[str, str]:
        """Tensors that an HF destination repeats: name -> the tensor whose bytes it has."""
        if self.to != "hf":
            return {}
        return {name: record.same_as for name, record in self.dropped.items() if record.same_as}

    def num_bytes(self, name: str) -> int:
        """Size of one HF tensor."""
        return prod(self.source.table.hf[name]) * DTYPE_BYTES[self.source.dtype_of(name)]

    @property
    def total_bytes(self) -> int:
        return sum(map(self.num_bytes, self.source.order))


def plan(src: Path, to: Format, options: SourceOptions = _DEFAULTS) -> Plan:
    """Reads config.json and headers only; refuses what the table of the family does not cover exactly once."""
    source = open_source(src, options)
    recorded = read_manifest(source.path)
    if recorded is not None and set(recorded.tensors) != set(source.table.hf):
        raise CheckpointError(
            f"{src / MANIFEST}: lists {len(recorded.tensors)} tensors, the model has {len(source.table.hf)}: the "
            "directory was changed after mswift wrote it; remove the manifest if that was meant"
        )
    dropped = dict(recorded.dropped) if recorded else {}
    for name, reason in source.dropped.items():
        dropped[name] = DroppedRecord(reason, source.repeats.get(name))
    return Plan(source, to, recorded, dropped)


def describe(planned: Plan, max_shard_bytes: int) -> str:
    """The plan as a table: one line for each Megatron tensor, then totals and what is dropped."""
    source, table = planned.source, planned.source.table
    rows = [("rule", "Megatron tensor", "shape", "Hugging Face tensors", "bytes")]
    for key, tensor in table.megatron.items():
        parts = " ".join(part.hf.replace("{l}", "*") for part in tensor.rule.parts)
        size = prod(tensor.shape) * DTYPE_BYTES[source.dtype]
        rows.append((tensor.rule.kind, key, str(list(tensor.shape)), parts, f"{size:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = planned.total_bytes
    if planned.to == "hf":
        where = f"safetensors files of at most {max_shard_bytes:,} bytes"
    else:
        where = "torch_dist"
    elements = total // DTYPE_BYTES[source.dtype]
    lines.append(f"{source.format} ({source.dtype}) -> {where}")
    lines.append(
        f"{len(source.order):,} tensors, {elements:,} elements, {total:,} bytes: each element moves exactly once"
    )
    for reason, names in grouped({name: record.reason for name, record in planned.dropped.items()}).items():
        lines.append(f"dropped {names}: {reason}")
    lines += [f"decoded {names}: {rule}" for rule, names in grouped(source.decoded).items()]
    for name, value in source.config_edits.items():
        lines.append(f"config.json: {name} " + ("is left out" if value is None else f"becomes {json.dumps(value)}"))
    if source.ignored:
        lines.append(f"config.json: ignored as asked: {', '.join(source.ignored)}")
    return "\n".join(lines)


def grouped(said: Mapping[str, str]) -> dict[str, str]:
    """What is said of names -> the names, in short."""
    groups: dict[str, list[str]] = {}
    for name, text in said.items():
        groups.setdefault(text, []).append(name)
    return {
        text: names[0] if len(names) == 1 else f"{names[0]}, ... ({len(names):,} tensors)"
        for text, names in groups.items()
    }


def convert(
    src: Path,
    dst: Path,
    to: Format,
    *,
    progress: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    num_workers: int | None = None,
    options: SourceOptions = _DEFAULTS,
) -> Manifest:
    """Writes the model in `src` (HF directory, converted directory or checkpoint) to the new directory `dst`.

    `dst` appears whole, by rename, or not at all. ConfigError if it exists; CheckpointError if the source is
    damaged or the disk full. Memory: 3 MiB a worker plus O(number of tensors).
    """
    started = time.perf_counter()
    planned = plan(Path(src), to, options)
    workers = num_workers or default_workers()
    with new_directory(Path(dst)) as directory:
        _check_space(planned, directory)
        destination = _destination(planned, directory, max_shard_bytes, workers)
        with early_writeback(list(destination.fds.values())):
            hashes = _execute(planned, destination, workers, progress)
        side_files = _carry(planned.source.side_files(), directory / destination.side_folder)
        manifest = Manifest(
            planned.source.format,
            destination.format,
            planned.source.table.family.model_type,
            _records(planned, hashes),
            planned.dropped,
            _finish(destination, side_files, workers),
            time.perf_counter() - started,
            tuple(dict.fromkeys(planned.source.ignored)),
            planned.source.config_edits,
        )
        manifest.write(directory)
    planned.source.close()
    return manifest


def _destination(planned: Plan, directory: Path, max_shard_bytes: int, workers: int) -> Destination:
    table, dtype = planned.source.table, planned.source.dtype
    if planned.to == "hf":
        return HfDestination(directory, table, dtype, planned.restored, max_shard_bytes)
    return MegatronDestination(directory, table, dtype, num_files=2 * workers)


def _check_space(planned: Plan, directory: Path) -> None:
    needed = planned.total_bytes + sum(map(planned.num_bytes, planned.restored.values()))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"--output_dir {directory.parent}: the disk is full: {needed:,} bytes are needed, {free:,} are free; "
            "free some space or name a directory on another disk"
        )


def _execute(planned: Plan, destination: Destination, workers: int, progress: bool) -> dict[str, str]:
    """Copies every tensor; returns sha256 of each, by HF name."""
    hashes: dict[str, str] = {}
    with progress_bar(planned.total_bytes, f"to {planned.to}", progress) as advance:

        def work(name: str, buffers: Buffers) -> None:
            size = planned.num_bytes(name)
            read = planned.source.stream(name, buffers.tile)
            digest = copy_tensor(name, size, read, destination.places(name), buffers)
            as_stored = planned.source.decoding(name) is None
            if planned.recorded is not None and as_stored and digest != planned.recorded.tensors[name].sha256:
                raise CheckpointError(
                    f"{planned.source.path}: {name} has sha256 {digest}, but the manifest there says "
                    f"{planned.recorded.tensors[name].sha256}: the files were damaged, or changed (if that was meant, "
                    f"remove {MANIFEST})"
                )
            hashes[name] = digest
            advance(size)

        run_all(planned.source.order, work, workers)
    return hashes


def copy_tensor(name: str, size: int, read: Read, places: Sequence[Place], buffers: Buffers) -> str:
    """Streams one HF tensor in the order of its bytes; returns their sha256."""
    digest = hashlib.sha256()
    repeats = sum(prod(d.size for d in place.copy.dims) for place in places)
    for low in range(0, size, PIECE_BYTES):
        view = read(low, min(size, low + PIECE_BYTES), buffers.block)
        digest.update(view)
        for place in places:
            for part in cut(place.copy, low, low + len(view)):
                repeats -= scatter(place.fd, part, view, low, buffers.tile)
    if repeats != 0:
        raise CheckpointError(f"{name}: {repeats} bytes were not written")
    return digest.hexdigest()


def _carry(files: Mapping[str, Path | bytes], folder: Path) -> list[Path]:
    """Copies what is not weights; returns the copies."""
    folder.mkdir(exist_ok=True)
    copies = []
    for name, content in files.items():
        copies.append(folder / name)
        if isinstance(content, bytes):
            copies[-1].write_bytes(content)
        else:
            shutil.copyfile(content, copies[-1])
        with open(copies[-1], "rb+") as file:
            os.fsync(file.fileno())
    return copies


def _records(planned: Plan, hashes: Mapping[str, str]) -> dict[str, TensorRecord]:
    source, table = planned.source, planned.source.table
    decoded, records = source.decoded, {}
    for name in table.hf_order:
        key = table.hf_pieces[name][0].names[1]
        kind = table.megatron[key].rule.kind
        records[name] = TensorRecord(
            source.dtype_of(name), table.hf[name], hashes[name], kind, key, decoded.get(name, "")
        )
    return records


def _finish(destination: Destination, side_files: Sequence[Path], workers: int) -> dict[str, FileRecord]:
    """Indexes, fsyncs and records the files of the destination."""

    def sync(fd: int, buffers: Buffers) -> None:
        os.fsync(fd)

    destination.finish()
    run_all(destination.fds.values(), sync, workers)
    destination.close()
    files = {}
    for path in sorted(destination.directory.iterdir()):
        if path.is_file() and path.name != ".lock":
            extents = destination.extents.get(path.name)
            files[path.name] = hash_whole(path) if extents is None else hash_frame(path, extents)
    for path in side_files:
        files[path.relative_to(destination.directory).as_posix()] = hash_whole(path)
    return files
