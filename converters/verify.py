"""Proof that two checkpoints hold the same model, bit for bit, or that one still is what its record says."""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path

import numpy as np

from mswift import rundir
from mswift.converters.io.files import PIECE_BYTES
from mswift.converters.io.side_files import MANIFEST
from mswift.converters.io.strided import Read
from mswift.converters.layout import strides
from mswift.converters.manifest import Manifest, hash_frame, hash_whole, read_manifest
from mswift.converters.plan import DTYPE_BYTES
from mswift.converters.sources import Source, SourceOptions, open_source
from mswift.converters.workers import Buffers, default_workers, progress_bar, run_all
from mswift.errors import CheckpointError, ConfigError

SHOWN_DIFFERENCES = 10
_DEFAULTS = SourceOptions()


@dataclass
class Report:
    """What a verification compared and what differed."""

    subject: str
    num_tensors: int = 0
    num_bytes: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        if self.equal:
            return f"equal: {self.subject} ({self.num_tensors:,} tensors, {self.num_bytes:,} bytes compared)"
        shown = [f"  {line}" for line in self.differences[:SHOWN_DIFFERENCES]]
        more = len(self.differences) - len(shown)
        tail = [f"  ... and {more} more"] if more > 0 else []
        return "\n".join([f"DIFFERENT: {self.subject}", *shown, *tail])


def verify(
    a: Path, b: Path, *, progress: bool = False, num_workers: int | None = None, options: SourceOptions = _DEFAULTS
) -> Report:
    """Compares every element of the model in `a` with that in `b`, whatever their formats and sharding.

    CheckpointError if one of them cannot be read; differences are in the report, in the model's order.
    """
    left, right = open_source(Path(a), options), open_source(Path(b), options)
    report = Report(f"{a} ({left.format}) and {b} ({right.format})")
    report.differences += _model_differences(left, right)
    names = [name for name in left.table.hf_order if left.table.hf[name] == right.table.hf.get(name)]
    if left.dtype != right.dtype:
        report.differences.append(
            f"dtype: {left.dtype} in {a}, {right.dtype} in {b} (--dtype compares what they are in one dtype)"
        )
        return report
    found: dict[str, str] = {}
    item_bytes = DTYPE_BYTES[left.dtype]
    sizes = {name: prod(left.table.hf[name]) * item_bytes for name in names}
    with progress_bar(sum(sizes.values()), "verify", progress) as advance:

        def work(name: str, buffers: Buffers) -> None:
            sides = (left.stream(name, buffers.tile), right.stream(name, buffers.tile))
            difference = _compare(name, left.table.hf[name], left.dtype, sides, buffers)
            if difference is not None:
                found[name] = difference
            advance(sizes[name])

        run_all(names, work, num_workers or default_workers())
    report.differences += [found[name] for name in names if name in found]
    report.num_tensors, report.num_bytes = len(names), sum(sizes.values())
    return report


def _model_differences(left: Source, right: Source) -> Iterable[str]:
    a, b = left.table.spec, right.table.spec
    for each in fields(a):
        if getattr(a, each.name) != getattr(b, each.name):
            yield f"config.json: {each.name} is {getattr(a, each.name)!r} and {getattr(b, each.name)!r}"
    for name in sorted(set(left.table.hf) ^ set(right.table.hf)):
        yield f"{name}: only in {(left if name in left.table.hf else right).path}"
    for name, shape in left.table.hf.items():
        other = right.table.hf.get(name, shape)
        if other != shape:
            yield f"{name}: shape {list(shape)} and {list(other)}"


def _compare(name: str, shape: Sequence[int], dtype: str, sides: tuple[Read, Read], buffers: Buffers) -> str | None:
    """The first differing element and how many differ, in words."""
    item_bytes = DTYPE_BYTES[dtype]
    first: tuple[int, str, str] | None = None
    count, size = 0, prod(shape) * item_bytes
    for low in range(0, size, PIECE_BYTES):
        high = min(size, low + PIECE_BYTES)
        a = sides[0](low, high, buffers.block)
        b = sides[1](low, high, buffers.other)
        x, y = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
        if np.array_equal(x, y):
            continue
        wrong = np.flatnonzero((x != y).reshape(-1, item_bytes).any(axis=1))
        count += len(wrong)
        if first is None:
            at = int(wrong[0]) * item_bytes
            mine, theirs = (element(dtype, view[at : at + item_bytes].tobytes()) for view in (a, b))
            first = ((low + at) // item_bytes, mine, theirs)
    if first is None:
        return None
    index = [first[0] // s % n for s, n in zip(strides(shape), shape, strict=True)]
    return f"{name}{index}: {first[1]} and {first[2]}; {count:,} of {prod(shape):,} elements differ"


def element(dtype: str, data: bytes) -> str:
    """One number as text, with its bits."""
    if dtype == "BF16":
        (value,) = struct.unpack("<f", b"\0\0" + data)
    else:
        (value,) = struct.unpack({"F32": "<f", "F16": "<e", "F64": "<d"}[dtype], data)
    return f"{value:.9g} (0x{data[::-1].hex()})"


def verify_record(path: Path, *, progress: bool = False, num_workers: int | None = None) -> Report:
    """Compares a directory with the hashes recorded when it was written: its manifest, or a checkpoint's COMMIT.

    ConfigError if it has neither.
    """
    manifest = read_manifest(path)
    if manifest is not None:
        return _verify_manifest(path, manifest, progress, num_workers or default_workers())
    if not (path / rundir.COMMIT).exists():
        raise ConfigError(
            f"{path}: has neither {MANIFEST} nor {rundir.COMMIT}, so there is no record to compare with; "
            "name the checkpoint that it should equal: mswift verify A B"
        )
    report = Report(f"{path} and its {rundir.COMMIT}")
    records = rundir.read_commit(path)
    for name, record in records.items():
        try:
            rundir.check_files(path, [name])
        except CheckpointError as error:
            report.differences.append(str(error))
        report.num_bytes += record.size_bytes
    report.num_tensors = len(open_source(path).table.hf) if report.equal else 0
    return report


def _verify_manifest(path: Path, manifest: Manifest, progress: bool, workers: int) -> Report:
    report = Report(f"{path} and its {MANIFEST} (sha256 {manifest.digest})")
    report.differences += _file_differences(path, manifest)
    if report.differences:
        return report
    source = open_source(path)
    found: dict[str, str] = {}
    with progress_bar(manifest.num_bytes, "verify", progress) as advance:

        def work(name: str, buffers: Buffers) -> None:
            size, digest = prod(source.table.hf[name]) * DTYPE_BYTES[source.dtype], hashlib.sha256()
            read = source.stream(name, buffers.tile)
            for low in range(0, size, PIECE_BYTES):
                high = min(size, low + PIECE_BYTES)
                digest.update(read(low, high, buffers.block))
            recorded = manifest.tensors.get(name)
            if recorded is None or recorded.sha256 != digest.hexdigest():
                said = recorded.sha256 if recorded else "nothing"
                found[name] = f"{name}: sha256 {digest.hexdigest()}, the manifest says {said}"
            advance(size)

        run_all(source.order, work, workers)
    report.differences += [found[name] for name in source.order if name in found]
    report.num_tensors, report.num_bytes = len(source.order), manifest.num_bytes
    for file, extents in source.extents().items():
        if hash_frame(path / file, extents) != manifest.files.get(file):
            report.differences.append(f"{file}: bytes outside the tensors differ from the manifest's")
    return report


def _file_differences(path: Path, manifest: Manifest) -> Iterable[str]:
    for name, record in manifest.files.items():
        file = path / name
        if not file.is_file():
            yield f"{name}: is missing"
        elif file.stat().st_size != record.bytes:
            yield f"{name}: has {file.stat().st_size:,} bytes, the manifest says {record.bytes:,}"
        elif not record.frame and hash_whole(file) != record:
            yield f"{name}: sha256 differs from the manifest's"
