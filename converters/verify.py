"""Proof that two checkpoints hold the same model, bit for bit, or that one still is what its record says."""

import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path
from threading import Lock

from mswift import rundir
from mswift.converters.copying import is_transposed, opened
from mswift.converters.io.descriptors import Descriptors
from mswift.converters.io.side_files import MANIFEST
from mswift.converters.layout import strides
from mswift.converters.manifest import Manifest, hash_frame, hash_whole, read_manifest
from mswift.converters.plan import DTYPE_BYTES
from mswift.converters.proof import measure
from mswift.converters.sources import Source, SourceOptions, open_source
from mswift.converters.work import LARGEST_SPAN_BYTES, spans
from mswift.converters.workers import Buffers, InOrder, default_workers, progress_bar, run_all
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
    non_finite: Mapping[str, int] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        if self.equal:
            line = f"equal: {self.subject} ({self.num_tensors:,} tensors, {self.num_bytes:,} bytes compared)"
            bad = sum(self.non_finite.values())
            return f"{line}; {bad:,} elements of {len(self.non_finite)} tensors are not finite" if bad else line
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
    same_shape = [name for name in left.table.hf_order if left.table.hf[name] == right.table.hf.get(name)]
    dtypes = {name: (left.dtype_of(name), right.dtype_of(name)) for name in same_shape}
    report.differences += _dtype_differences(dtypes, a, b)
    comparison = _Comparison(left, right, [name for name in same_shape if len(set(dtypes[name])) == 1])
    report.differences += comparison.run(progress, num_workers or default_workers())
    report.num_tensors, report.num_bytes = len(comparison.names), sum(comparison.sizes.values())
    left.close()
    right.close()
    return report


def _dtype_differences(dtypes: Mapping[str, tuple[str, str]], a: Path, b: Path) -> Iterable[str]:
    """One line for each pair of different dtypes."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, pair in dtypes.items():
        if pair[0] != pair[1]:
            found.setdefault(pair, []).append(name)
    for (mine, theirs), names in found.items():
        yield (
            f"dtype: {mine} in {a}, {theirs} in {b}"
            + f" ({len(names)} of {len(dtypes)} tensors, {names[0]} first; --dtype compares both in one)"
        )


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


class _Comparison:
    """Two sources compared span by span, by several threads; what differs is summed up for each tensor."""

    def __init__(self, left: Source, right: Source, names: Sequence[str]) -> None:
        self.left, self.right, self.names = left, right, names
        self.sizes = {name: left.num_bytes(name) for name in names}
        self._files = Descriptors()
        self._lock = Lock()
        self._first: dict[str, tuple[int, bytes, bytes]] = {}
        self._count: Counter[str] = Counter()

    def run(self, progress: bool, num_workers: int) -> list[str]:
        """What differs, in the order of the names."""
        units = [(n, low, high) for n in self.names for low, high in spans(0, self.sizes[n], LARGEST_SPAN_BYTES)]
        with progress_bar(sum(self.sizes.values()), "verify", progress) as advance:

            def work(unit: tuple[str, int, int], buffers: Buffers) -> None:
                self._span(*unit, buffers)
                advance(unit[2] - unit[1])

            run_all(InOrder(units), work, num_workers)
        self._files.close()
        return [self._words(name) for name in self.names if name in self._first]

    def _span(self, name: str, low: int, high: int, buffers: Buffers) -> None:
        import numpy as np

        item_bytes = DTYPE_BYTES[self.left.dtype_of(name)]
        with opened(self.left, name, self._files) as mine, opened(self.right, name, self._files) as other:
            wide = is_transposed(mine.direct(), other.direct())
            blocks = (buffers.wide, buffers.other_wide) if wide else (buffers.block, buffers.other)
            for start in range(low, high, len(blocks[0])):
                end = min(high, start + len(blocks[0]))
                a = mine.read(start, end, blocks[0], buffers.tile)
                b = other.read(start, end, blocks[1], buffers.tile)
                x, y = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
                if np.array_equal(x, y):
                    continue
                wrong = np.flatnonzero((x != y).reshape(-1, item_bytes).any(axis=1))
                at = int(wrong[0]) * item_bytes
                found = (start + at, bytes(a[at : at + item_bytes]), bytes(b[at : at + item_bytes]))
                with self._lock:
                    self._count[name] += len(wrong)
                    self._first[name] = min(self._first.get(name, found), found)

    def _words(self, name: str) -> str:
        """The first differing element and how many differ."""
        dtype, shape = self.left.dtype_of(name), self.left.table.hf[name]
        position, mine, theirs = self._first[name]
        at = position // DTYPE_BYTES[dtype]
        index = [at // s % n for s, n in zip(strides(shape), shape, strict=True)]
        values = f"{element(dtype, mine)} and {element(dtype, theirs)}"
        return f"{name}{index}: {values}; {self._count[name]:,} of {prod(shape):,} elements differ"


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
    report = Report(f"{path} and its {MANIFEST} (BLAKE3 {manifest.digest})")
    report.differences += _file_differences(path, manifest)
    if report.differences:
        return report
    unknown = [name for name, record in manifest.tensors.items() if record.blake3 is None]
    if unknown:
        raise ConfigError(
            f"{path / MANIFEST}: has no hash of {len(unknown)} of {len(manifest.tensors)} tensors (it was made with "
            "--hash_source false); name the checkpoint that it should equal: mswift verify A B"
        )
    source = open_source(path)
    measured = measure(source, workers, progress)
    for name in source.order:
        record, found = manifest.tensors.get(name), measured[name]
        if record is None or record.blake3 != found.blake3:
            said = record.blake3 if record else "nothing"
            report.differences.append(f"{name}: BLAKE3 {found.blake3}, the manifest says {said}")
    report.non_finite = {name: each.non_finite for name, each in measured.items() if each.non_finite}
    report.num_tensors, report.num_bytes = len(source.order), manifest.num_bytes
    for file, extents in source.extents().items():
        if hash_frame(path / file, extents) != manifest.files.get(file):
            report.differences.append(f"{file}: bytes outside the tensors differ from the manifest's")
    source.close()
    return report


def _file_differences(path: Path, manifest: Manifest) -> Iterable[str]:
    for name, record in manifest.files.items():
        file = path / name
        if not file.is_file():
            yield f"{name}: is missing"
        elif file.stat().st_size != record.bytes:
            yield f"{name}: has {file.stat().st_size:,} bytes, the manifest says {record.bytes:,}"
        elif not record.frame and hash_whole(file) != record:
            yield f"{name}: BLAKE3 differs from the manifest's"
