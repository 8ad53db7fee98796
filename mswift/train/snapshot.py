"""Hugging Face files out of a model in training: every rank writes its own bytes into them, nothing is gathered.

output_dir/hf-<step>/ of a full run is a model directory, as `mswift export` of that step's checkpoint makes it; of a
LoRA run a PEFT adapter. It appears by rename, whole. Memory above the model: one tensor's share of a rank, one tile.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mswift import rundir
from mswift.converters.adapters import trained_name
from mswift.converters.destinations import HfDestination
from mswift.converters.engine import MAX_SHARD_BYTES
from mswift.converters.io.files import PIECE_BYTES, write_file
from mswift.converters.io.safetensors import encode_header
from mswift.converters.io.strided import scatter
from mswift.converters.layout import Piece, flatten, identity, restrict
from mswift.converters.plan import DTYPE_BYTES, ModelTable
from mswift.errors import CheckpointError
from mswift.parallel.engine import Engine, StateShard
from mswift.train.collective import agreed, gather_objects
from mswift.train.plain_shards import plain_shards
from mswift.train.save import dtype_name, shard_bytes
from mswift.tuners.export import STORED
from mswift.tuners.method import place_of
from mswift.tuners.other_adapters import parse_other
from mswift.tuners.peft_config import CONFIG_FILE, WEIGHTS_FILE, parse_peft_config
from mswift.tuners.plain import as_plain
from mswift.tuners.shapes import promised_shapes
from mswift.tuners.xlora_files import directory_configs

Moves = Iterator[tuple[Path, Piece]]
"""(file, flat byte map: side 0 the memory of a shard, side 1 the file)."""


class ModelFiles:
    """The safetensors files of a whole model. dtypes: Megatron key -> dtype."""

    def __init__(self, directory: Path, table: ModelTable, dtypes: Mapping[str, str]) -> None:
        self._table = table
        of_hf = {name: dtypes[table.hf_pieces[name][0].names[1]] for name in table.hf_order}
        self._destination = HfDestination(directory, table, of_hf, table.mtp_copies, MAX_SHARD_BYTES)
        self._names = {name: [name] for name in table.hf_order}
        for copy, name in table.mtp_copies.items():
            self._names[name].append(copy)
        self.sizes = self._destination.sizes

    def headers(self) -> Iterator[tuple[str, bytes]]:
        """What stands before the tensors, file by file."""
        for file in self.sizes:
            for _, header in self._destination.frame(file):
                yield file, header

    def moves(self, shard: StateShard, item_bytes: int) -> Moves:
        """Where the bytes of a box of a Megatron tensor go."""
        region = shard.region
        for whole in self._table.pieces_in(shard.key, region):
            for piece in restrict(whole, region, 1):
                name = piece.names[0]
                local = tuple(s - o for s, o in zip(piece.starts[1], region.offsets, strict=True))
                moved = Piece(piece.names, (piece.starts[0], local), piece.dims).inverse()
                flat = flatten(moved, (region.sizes, self._table.hf[name]), item_bytes)
                for written in self._names[name]:
                    (place,) = self._destination.places(written)
                    yield place.path, flat.moved(1, place.copy.starts[1][0])

    def finish(self) -> None:
        """The index of several files."""
        self._destination.finish()


class AdapterFile:
    """The safetensors files of a PEFT adapter; a tied embedding stands there under both of its names.

    There is one, but of LoRAs that X-LoRA mixes.
    """

    def __init__(self, directory: Path, table: ModelTable, config: bytes, dtypes: Mapping[str, str]) -> None:
        self._directory = directory
        shapes, left = _shapes(table, json.loads(config), directory / CONFIG_FILE)
        self._left = {STORED + name for name in left}
        self._names: dict[str, list[str]] = {}
        tensors: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        for name in sorted(shapes, key=place_of):
            key = STORED + trained_name(table, name)
            self._names.setdefault(key, []).append(name)
            folder, full = place_of(name)
            tensors.setdefault(_file_in(folder), {})[full] = (dtypes[key], shapes[name])
        self._headers: dict[str, bytes] = {}
        self._offsets: dict[str, Mapping[str, int]] = {}
        self.sizes: dict[str, int] = {}
        for file, own in tensors.items():
            self._headers[file], self._offsets[file] = encode_header(own)
            size = sum(prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in own.values())
            self.sizes[file] = len(self._headers[file]) + size

    def headers(self) -> Iterator[tuple[str, bytes]]:
        """What stands before the tensors, file by file."""
        yield from self._headers.items()

    def moves(self, shard: StateShard, item_bytes: int) -> Moves:
        """Where the bytes of a box of an adapter tensor go; nowhere, if the file has what was made of it."""
        if shard.key in self._left:
            return
        starts = (tuple(0 for _ in shard.shape), shard.region.offsets)
        copy = flatten(identity(("", ""), shard.region, starts), (shard.region.sizes, shard.shape), item_bytes)
        for folder, full in map(place_of, self._names[shard.key]):
            file = _file_in(folder)
            yield self._directory / file, copy.moved(1, self._offsets[file][full])

    def finish(self) -> None:
        """These files need no index."""


def _file_in(folder: str) -> str:
    return f"{folder}/{WEIGHTS_FILE}" if folder else WEIGHTS_FILE


def _shapes(
    table: ModelTable, content: Mapping[str, Any], path: Path
) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """(what an adapter's file holds, what is trained and not in it) by the content of its adapter_config.json."""
    if content.get("peft_type") == "LORA":
        return promised_shapes(table, parse_peft_config(content, path)), frozenset()
    adapter, saved = parse_other(content, path, table.spec.num_layers)
    shapes = adapter.file_shapes(table, saved)
    return shapes, frozenset(adapter.trained_shapes(table).keys() - shapes.keys())


@dataclass(frozen=True)
class Snapshot:
    """The snapshot of one step, on one rank. hf_files: the files beside the weights; rank 0 writes them."""

    output_dir: Path
    step: int
    rank: int
    hf_files: Mapping[str, bytes]

    def write(self, engine: Engine) -> Path:
        """Write and publish it; on a failure nothing is published and all ranks raise CheckpointError."""
        destination, partial = (
            f(self.output_dir, self.step) for f in (rundir.snapshot_dir, rundir.partial_snapshot_dir)
        )
        dtypes = {shard.key: dtype_name(shard.tensor) for shard in _shards(engine)}
        known = {key: dtype for some in gather_objects(dtypes) for key, dtype in some.items()}
        try:
            with agreed(f"writing {destination}"):
                files = self._files(engine, partial, known)
                if self.rank == 0:
                    _make(partial, files)
            with agreed(f"writing {destination}"):
                written = _write_shards(_shards(engine), files)
            expected = sum(files.sizes.values()) - sum(len(header) for _, header in files.headers())
            if (total := sum(gather_objects(written))) != expected:
                raise CheckpointError(f"writing {destination}: {total} bytes written, {expected} expected")
            with agreed(f"writing {destination}"):
                if self.rank == 0:
                    self._publish(engine, files, partial, destination)
        except CheckpointError:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return destination

    def _files(self, engine: Engine, partial: Path, dtypes: Mapping[str, str]) -> ModelFiles | AdapterFile:
        if not engine.config.trains_adapter:
            return ModelFiles(partial, engine.table, dtypes)
        lora = engine.config.lora
        table = (
            engine.table if lora is None else lora.own_table(engine.table)
        )  # which says what a name of experts means
        return AdapterFile(partial, table, self._beside(engine)[CONFIG_FILE], dtypes)

    def _beside(self, engine: Engine) -> dict[str, bytes]:
        """hf_files, with the configuration of the plain LoRA that an adapter is that starts as a part of the weight."""
        files, lora = dict(self.hf_files), engine.config.lora
        if lora is not None and lora.settings.starts_in_weight:
            files[CONFIG_FILE] = as_plain(lora.settings, files[CONFIG_FILE])[1]
        return files

    def _side_files(self, engine: Engine, destination: Path) -> dict[str, bytes]:
        files = self._beside(engine)
        return files | directory_configs(files[CONFIG_FILE], destination) if CONFIG_FILE in files else files

    def _publish(self, engine: Engine, files: ModelFiles | AdapterFile, partial: Path, destination: Path) -> None:
        """Side files, then the rename. A run that was set back to before this step replaces the earlier snapshot."""
        files.finish()
        for name, data in self._side_files(engine, destination).items():
            write_file(partial / name, data)
        for folder in {(partial / file).parent for file in files.sizes} | {partial}:
            rundir.fsync_path(folder)
        before = destination.with_name(f"{destination.name}.replaced-{time.time_ns()}")
        if destination.exists():
            destination.rename(before)
        partial.rename(destination)
        rundir.fsync_path(destination.parent)
        shutil.rmtree(before, ignore_errors=True)


def _shards(engine: Engine) -> Iterator[StateShard]:
    """What this rank has of the files."""
    lora, shards = engine.config.lora, engine.model_shards()
    return plain_shards(shards) if lora is not None and lora.settings.starts_in_weight else shards


def _make(partial: Path, files: ModelFiles | AdapterFile) -> None:
    """The files at their full size, with their headers."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file, header in files.headers():
        (partial / file).parent.mkdir(exist_ok=True)
        with (partial / file).open("xb") as out:
            out.write(header)
            out.truncate(files.sizes[file])


def _write_shards(shards: Iterable[StateShard], files: ModelFiles | AdapterFile) -> int:
    """This rank's boxes, each in its place; returns bytes, which are on the disk then."""
    tile, count = memoryview(bytearray(PIECE_BYTES)), 0
    opened: dict[Path, int] = {}
    try:
        for shard in shards:
            data = shard_bytes(shard)
            for path, copy in files.moves(shard, DTYPE_BYTES[dtype_name(shard.tensor)]):
                if path not in opened:
                    opened[path] = os.open(path, os.O_WRONLY)
                count += scatter(opened[path], copy, data, 0, tile)
        for descriptor in opened.values():
            os.fsync(descriptor)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    return count
