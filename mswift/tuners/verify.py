"""Proof that two adapters are the same, whatever their formats, or that one still is what its manifest says."""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

from mswift import rundir
from mswift.converters.io.side_files import MANIFEST
from mswift.converters.manifest import hash_whole, read_manifest
from mswift.converters.measured import Measuring
from mswift.converters.plan import DTYPE_BYTES
from mswift.converters.verify import Report
from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.convert import blocks_of, open_adapter
from mswift.tuners.detect import is_adapter
from mswift.tuners.peft_config import CONFIG_FILE, PREFIX
from mswift.tuners.sources import AdapterFiles


def verify_adapters(a: Path, b: Path | None, base_model: str | None) -> Report:
    """Compares two adapters, or one with its manifest or COMMIT; what differs is named in the report."""
    if b is None:
        return _verify_record(a, base_model)
    if not is_adapter(b):
        raise ConfigError(f"B {b} is no adapter, A {a} is one")
    left, right = open_adapter(a, base_model), open_adapter(b, base_model)
    report = Report(f"{a} ({left.format}) and {b} ({right.format})")
    report.differences += _differences(left, right)
    _count(report, left)
    return report


def _verify_record(path: Path, base_model: str | None) -> Report:
    manifest = read_manifest(path)
    if manifest is None:
        if not (path / rundir.COMMIT).is_file():
            raise ConfigError(f"{path}: has neither {MANIFEST} nor {rundir.COMMIT}; compare it: mswift verify A B")
        report = Report(f"{path} and its {rundir.COMMIT}")
        try:
            rundir.check_files(path)
        except CheckpointError as error:
            report.differences.append(str(error))
        return report
    report = Report(f"{path} and its {MANIFEST} (BLAKE3 {manifest.digest})")
    for name, record in manifest.files.items():
        if not (path / name).is_file():
            report.differences.append(f"{name}: is missing")
        elif hash_whole(path / name) != record:
            report.differences.append(f"{name}: differs from the manifest's")
    if report.differences:
        return report
    files = open_adapter(path, base_model)
    for name in files.tensors:
        measuring = Measuring(files.tensors[name][0])
        for block in blocks_of(files, name):
            measuring(memoryview(block))
        known = manifest.tensors.get(PREFIX + name)
        if known is None or known.measured != measuring.result():
            report.differences.append(f"{PREFIX}{name}: BLAKE3 differs from the manifest's")
    _count(report, files)
    return report


def _count(report: Report, files: AdapterFiles) -> None:
    report.num_tensors = len(files.tensors)
    report.num_bytes = sum(prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in files.tensors.values())


def _differences(a: AdapterFiles, b: AdapterFiles) -> Iterator[str]:
    one, other = (json.loads(files.config) for files in (a, b))
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            yield f"{CONFIG_FILE}: {name} is {one.get(name)!r} and {other.get(name)!r}"
    for name in sorted(a.tensors.keys() | b.tensors.keys()):
        if name not in a.tensors or name not in b.tensors:
            yield f"{PREFIX}{name}: only in {(a if name in a.tensors else b).path}"
        elif a.tensors[name] != b.tensors[name]:
            yield f"{PREFIX}{name}: {a.tensors[name]} and {b.tensors[name]}"
        elif any(x != y for x, y in zip(blocks_of(a, name), blocks_of(b, name), strict=True)):
            yield f"{PREFIX}{name}: bits differ"
