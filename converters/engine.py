"""plan -> execute -> prove: weights moved between formats, file to file, with bounded memory and no model."""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial as partial_of
from math import prod
from pathlib import Path
from typing import Literal

from mswift import __version__
from mswift.converters import execute
from mswift.converters.destinations import Destination, HfDestination, MegatronDestination
from mswift.converters.finish import finish
from mswift.converters.io.files import in_words
from mswift.converters.io.partial import Identity, Partial
from mswift.converters.io.side_files import MANIFEST, identity_of
from mswift.converters.journal import Done
from mswift.converters.manifest import DroppedRecord, Manifest, read_manifest
from mswift.converters.plan import DTYPE_BYTES
from mswift.converters.sources import Source, SourceOptions, open_source
from mswift.converters.work import part_of, units_of
from mswift.converters.workers import default_workers
from mswift.errors import CheckpointError, MswiftError

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
        return self.source.num_bytes(name)

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
        dtype = source.dtype_of(table.pieces(key, range(1), range(1))[0].names[0])
        size = prod(tensor.shape) * DTYPE_BYTES[dtype]
        rows.append((tensor.rule.kind, key, str(list(tensor.shape)), parts, f"{size:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = planned.total_bytes
    if planned.to == "hf":
        where = f"safetensors files of at most {max_shard_bytes:,} bytes"
    else:
        where = "torch_dist"
    elements = sum(prod(table.hf[name]) for name in source.order)
    lines.append(f"{source.format} ({source.dtype}) -> {where}")
    lines.append(
        f"{len(source.order):,} tensors, {elements:,} elements, {total:,} bytes: each element moves exactly once"
    )
    compared = {name: " (compared when it is converted)" for name, d in planned.dropped.items() if d.same_as}
    reasons = {name: record.reason + compared.get(name, "") for name, record in planned.dropped.items()}
    lines += [f"dropped {names}: {reason}" for reason, names in grouped(reasons).items()]
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
    hash_source: bool = True,
    source_options: SourceOptions = _DEFAULTS,
    hash_output: bool = False,
    restart: bool = False,
) -> Manifest:
    """Writes the model in `src` (HF directory, converted directory or checkpoint) to the new directory `dst`.

    `dst` appears whole, by rename, or not at all. After a kill or a full disk the same call continues where that one
    was (`restart`: begins anew). ConfigError if `dst` exists; CheckpointError if the source is damaged or the disk
    full. Memory: 3 MiB a worker, 16 more for transposed tensors, plus O(number of tensors).
    """
    job = _Job.of(src, dst, to, source_options, max_shard_bytes, hash_source, num_workers, progress)
    done = job.copy(1, 1, restart)
    return job.publish(done, hash_output)


def convert_part(
    src: Path,
    dst: Path,
    to: Format,
    part: int,
    parts: int,
    *,
    progress: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    num_workers: int | None = None,
    hash_source: bool = True,
    source_options: SourceOptions = _DEFAULTS,
    restart: bool = False,
) -> int:
    """Copies part `part` (from 1) of `parts` beside `dst`, continuing an earlier try; returns the part's bytes.

    Parts are independent: on any node that sees both directories, at any time, in any order.
    """
    job = _Job.of(src, dst, to, source_options, max_shard_bytes, hash_source, num_workers, progress)
    done = job.copy(part, parts, restart)
    job.close()
    return done.num_bytes


def finish_parts(
    src: Path,
    dst: Path,
    to: Format,
    *,
    progress: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    num_workers: int | None = None,
    hash_source: bool = True,
    source_options: SourceOptions = _DEFAULTS,
    hash_output: bool = False,
) -> Manifest:
    """Proves that every part is there, every tensor exactly once, and publishes `dst`.

    CheckpointError naming the parts that are missing or incomplete.
    """
    job = _Job.of(src, dst, to, source_options, max_shard_bytes, hash_source, num_workers, progress)
    job.planned.source.check_repeats()
    parts = job.partial.join(job.identity)
    with job.worded(keep=True):
        done = execute.gather_parts(job.partial, parts, job.units)
    return job.publish(done, hash_output, keep=True)


class _Job:
    """One conversion: the plan, the layout of the destination, and the directory in which it grows."""

    def __init__(self, planned: Plan, destination: Destination, partial: Partial, options: execute.Options) -> None:
        self.started = time.perf_counter()
        self.planned, self.destination, self.partial, self.options = planned, destination, partial, options
        self.units = units_of(destination, planned.source.order, planned.num_bytes)
        reading = (planned.source.ignored, planned.source.config_edits, planned.source.decoded)
        known = [__version__, planned.to, options.hash_source, sorted(planned.restored), reading]
        folders = dict.fromkeys((planned.source.path, planned.source.hf_files))
        self._source_state = partial_of(identity_of, folders)
        self._state_then = self._source_state()
        text = json.dumps([known, list(destination.sizes.items()), self._state_then])
        self.identity = hashlib.sha256(text.encode()).hexdigest()

    @staticmethod
    def of(
        src: Path,
        dst: Path,
        to: Format,
        source: SourceOptions,
        max_shard_bytes: int,
        hash_source: bool,
        workers: int | None,
        progress: bool,
    ) -> "_Job":
        """Plans everything; nothing is written."""
        planned, partial = plan(Path(src), to, source), Partial(Path(dst))
        options = execute.Options(hash_source, workers or default_workers(), progress)
        return _Job(planned, _destination(planned, partial.data, max_shard_bytes), partial, options)

    def copy(self, part: int, parts: int, restart: bool) -> Done:
        """Copies what is missing of a part; what is there now."""
        if part == 1:
            self.planned.source.check_repeats()
        identity = Identity(self.identity, parts, str(self.planned.source.path), self.planned.to)
        note = self.partial.begin(identity, part, restart=restart)
        if note:
            print(note, file=sys.stderr)
        units = part_of(self.units, part, parts)
        journal = self.partial.journal(part, parts)
        with self.worded(keep=parts > 1):
            return execute.run(self.planned.source, self._recorded(), self.destination, units, journal, self.options)

    def publish(self, done: Done, hash_output: bool, *, keep: bool = False) -> Manifest:
        """Index, side files, proof and manifest, then the rename."""
        with self.worded(keep=keep):
            source, recorded = self.planned.source, self._recorded()
            hashes = {name: done.hashes.get(name, recorded.get(name)) for name in source.order}
            manifest = finish(source, self.destination, hashes, self.planned.dropped, self.options, hash_output)
            manifest = manifest.timed(time.perf_counter() - self.started)
            manifest.write(self.destination.directory)
            if self._source_state() != self._state_then:
                raise CheckpointError(f"{source.path}: was changed while it was converted; convert it again")
            self.partial.publish()
        self.close()
        return manifest

    def _recorded(self) -> dict[str, str]:
        """Hashes that the source's manifest promises, of tensors that are taken as they are stored."""
        recorded = self.planned.recorded.tensors if self.planned.recorded else {}
        decoded = self.planned.source.decoded
        return {n: record.sha256 for n, record in recorded.items() if record.sha256 is not None and n not in decoded}

    def close(self) -> None:
        """Gives up locks and files."""
        self.partial.close()
        self.planned.source.close()

    @contextmanager
    def worded(self, *, keep: bool = False) -> Iterator[None]:
        """Words the errors of the destination; keeps what can be continued, removes what cannot (unless `keep`)."""
        try:
            yield
        except BaseException as error:
            done = execute.recorded_bytes(self.partial)
            kept = keep or (
                done > 0 and not (isinstance(error, MswiftError) and not isinstance(error, execute.NoSpace))
            )
            if not kept:
                self.partial.discard()
            self.close()
            state = "nothing was published"
            if kept:
                state += (
                    f", {done:,} of {self.planned.total_bytes:,} bytes are copied and kept in {self.partial.path}: "
                    "the same command continues, with --restart it begins anew"
                )
            if isinstance(error, OSError):
                raise in_words(error, self.partial.destination, self.partial.flag, state) from None
            if kept and isinstance(error, KeyboardInterrupt):
                print(f"{self.partial.destination}: stopped; {state}", file=sys.stderr)
            raise


def _destination(planned: Plan, data: Path, max_shard_bytes: int) -> Destination:
    table = planned.source.table
    dtypes = {name: planned.source.dtype_of(name) for name in planned.source.order}
    if planned.to == "hf":
        return HfDestination(data, table, dtypes, planned.restored, max_shard_bytes)
    return MegatronDestination(data, table, dtypes)
