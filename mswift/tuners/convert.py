"""`mswift convert` and `mswift verify` of adapters: PEFT directories and torch_dist tensors, without torch.

Nothing is published unless the source holds exactly the tensors that its adapter_config.json promises for its base
and every one was written; the proof is mswift_manifest.json.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from mswift import rundir
from mswift.config.convert import ConvertConfig
from mswift.converters.io.files import check_absent, new_directory, write_file
from mswift.converters.io.side_files import MANIFEST
from mswift.converters.io.torch_dist import ShardWriter, write_index
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.manifest import FileRecord, Manifest, TensorRecord, hash_whole, read_manifest
from mswift.converters.measured import Measured, Measuring
from mswift.converters.plan import DTYPE_BYTES
from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.bridge_destination import BridgePlan, plan_bridge, write_bridge
from mswift.tuners.bridge_source import format_name, open_bridge
from mswift.tuners.detect import HF_FOLDER, RUN_CONFIG, is_torch_dist, layout_of
from mswift.tuners.export import STORED
from mswift.tuners.files import row_blocks, write_safetensors
from mswift.tuners.peft_config import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from mswift.tuners.sources import BASE_CONFIG, AdapterFiles, open_peft, open_stored

AdapterLayout = Literal["mswift", "fused", "canonical"]


def open_adapter(path: Path, base_model: str | None) -> AdapterFiles:
    """Any adapter, whatever its format; ConfigError or CheckpointError if it cannot be carried exactly."""
    if not is_torch_dist(path):
        return open_peft(path, base_model)
    if layout_of(list(TorchDistSource(path).tensors)) is not None:
        return open_bridge(path, base_model)
    return open_stored(path, base_model)


def convert(config: ConvertConfig, source: Path) -> int:
    """The command, for a source that `is_adapter`; prints the proof."""
    for name in ("optimizer", "part", "finish", "hash_output", "dtype", "model_config", "complete_config"):
        if getattr(config, name):
            raise ConfigError(f"--{name} is for models; {source} is an adapter: leave it out")
    layout, fuse = config.adapter_layout, config.fuse_adapters
    if config.to == "hf" and (layout != "mswift" or fuse != "equal"):
        raise ConfigError("--adapter_layout and --fuse_adapters say how --to megatron is laid out; leave them out")
    if layout != "fused" and fuse != "equal":
        raise ConfigError("--fuse_adapters stack is for --adapter_layout fused; the other layouts do not fuse")
    files = open_adapter(source, config.base_model)
    if config.dry_run:
        check_absent(Path(config.output_dir), "--output_dir")
        print(describe(files, config.to, layout, fuse))
        return 0
    if (source / rundir.COMMIT).is_file():
        rundir.check_files(source)
    manifest = convert_adapter(files, Path(config.output_dir), config.to, layout=layout, fuse=fuse)
    print(f"{config.output_dir}: {manifest}")
    return 0


def describe(files: AdapterFiles, to: str, layout: AdapterLayout, fuse: Literal["equal", "stack"]) -> str:
    """The plan as a table: one line for each tensor of PEFT's."""
    keys: Mapping[str, str] = {}
    if to == "megatron":
        keys = plan_bridge(files, layout, fuse).keys() if layout != "mswift" else {n: STORED + n for n in files.tensors}
    rows = [
        f"{dtype:5} {list(shape)!s:18} {PREFIX}{name}" + (f" -> {keys[name]}" if keys else "")
        for name, (dtype, shape) in files.tensors.items()
    ]
    where = f"{files.format} -> {to}" + (f" ({layout})" if to == "megatron" else "")
    return "\n".join([*rows, f"{where}, base {files.table.family.model_type}: {len(rows)} tensors"])


def convert_adapter(
    files: AdapterFiles,
    destination: Path,
    to: Literal["megatron", "hf"],
    *,
    layout: AdapterLayout = "mswift",
    fuse: Literal["equal", "stack"] = "equal",
) -> Manifest:
    """Writes an opened adapter to a new directory, which appears whole or not at all."""
    started = time.perf_counter()
    bridge = plan_bridge(files, layout, fuse) if to == "megatron" and layout != "mswift" else None
    hashes = _Hashes(files)
    with new_directory(destination) as directory:
        if to == "hf":
            _write_peft(files, directory, hashes)
        else:
            _write_torch_dist(files, directory, hashes, bridge)
        hashes.check_complete()
        paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != ".lock")
        records: dict[str, FileRecord] = {p.relative_to(directory).as_posix(): hash_whole(p) for p in paths}
        manifest = Manifest(
            files.format,
            "PEFT" if to == "hf" else format_name(bridge.layout, bridge.stack) if bridge else "torch_dist",
            files.table.family.model_type,
            hashes.records(bridge),
            {},
            records,
            time.perf_counter() - started,
        )
        manifest.write(directory)
    return manifest


class _Hashes:
    """BLAKE3 of every tensor on its way, against the manifest of the source if it has one."""

    def __init__(self, files: AdapterFiles) -> None:
        self._files = files
        self._found: dict[str, Measured] = {}
        recorded = read_manifest(files.path)
        self._recorded = {} if recorded is None else recorded.tensors

    def take(self, name: str, blocks: Iterator[bytearray]) -> Iterator[bytearray]:
        """The blocks of one tensor, hashed as they pass."""
        measuring = self.measuring(name)
        for block in blocks:
            measuring(memoryview(block))
            yield block
        self.note(name, measuring.result())

    def measuring(self, name: str) -> Measuring:
        return Measuring(self._files.tensors[name][0])

    def note(self, name: str, measured: Measured) -> None:
        """CheckpointError if the source's own manifest says otherwise, or the tensor came twice."""
        if name in self._found:
            raise CheckpointError(f"{self._files.path}: {PREFIX}{name} was moved twice")
        record = self._recorded.get(PREFIX + name)
        if self._recorded and (record is None or record.measured != measured):
            raise CheckpointError(
                f"{self._files.path}: {PREFIX}{name} is not what {MANIFEST} there says: the files were damaged, or "
                "changed (if that was meant, remove it)"
            )
        self._found[name] = measured

    def check_complete(self) -> None:
        """CheckpointError unless every tensor of the source was moved."""
        missing = sorted(self._files.tensors.keys() - self._found.keys())
        if missing:
            raise CheckpointError(
                f"{self._files.path}: {PREFIX}{missing[0]} was not moved ({len(missing)} such tensors)"
            )

    def records(self, bridge: BridgePlan | None) -> dict[str, TensorRecord]:
        keys = bridge.keys() if bridge else {}
        rule = f"{bridge.layout}, {'stacked' if bridge.stack else 'A shared'}" if bridge else "adapter"
        records = {}
        for name, (dtype, shape) in sorted(self._files.tensors.items()):
            key = keys.get(name, STORED + name)
            records[PREFIX + name] = TensorRecord.of(dtype, shape, self._found[name], rule, key)
        return records


def blocks_of(files: AdapterFiles, name: str) -> Iterator[bytearray]:
    """The bytes of a tensor in C order, in blocks of rows."""
    dtype, shape = files.tensors[name]
    for region in row_blocks(shape, DTYPE_BYTES[dtype]):
        buffer = bytearray(region.num_elements * DTYPE_BYTES[dtype])
        files.read(name, region, memoryview(buffer))
        yield buffer


def _write_peft(files: AdapterFiles, directory: Path, hashes: _Hashes) -> None:
    def blocks(name: str) -> Iterator[bytearray]:
        own = name.removeprefix(PREFIX)
        return hashes.take(own, blocks_of(files, own))

    write_safetensors(directory / WEIGHTS_FILE, {PREFIX + n: t for n, t in sorted(files.tensors.items())}, blocks)
    write_file(directory / CONFIG_FILE, files.config)
    _carry(files, directory)


def _write_torch_dist(files: AdapterFiles, directory: Path, hashes: _Hashes, bridge: BridgePlan | None) -> None:
    writer = ShardWriter(directory, "__0_0.distcp")
    if bridge is None:
        for name, (dtype, shape) in files.tensors.items():
            regions = row_blocks(shape, DTYPE_BYTES[dtype])
            for region, block in zip(regions, hashes.take(name, blocks_of(files, name)), strict=True):
                writer.add(STORED + name, dtype, shape, region, memoryview(block))
    else:
        for name, data in write_bridge(files, bridge, writer):
            measuring = hashes.measuring(name)
            measuring(memoryview(data))
            hashes.note(name, measuring.result())
        write_file(directory / RUN_CONFIG, bridge.config)
    write_index(directory, [writer.close()])
    (directory / HF_FOLDER).mkdir()
    write_file(directory / HF_FOLDER / CONFIG_FILE, files.config)
    write_file(directory / HF_FOLDER / BASE_CONFIG, files.base_config)
    _carry(files, directory / HF_FOLDER)


def _carry(files: AdapterFiles, folder: Path) -> None:
    for path in files.side_files:
        shutil.copyfile(path, folder / path.name)
