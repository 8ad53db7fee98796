"""plan -> execute -> prove: weights moved between formats, file to file, with bounded memory and no model."""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial as partial_of
from pathlib import Path
from typing import Literal, TypedDict, Unpack

from mswift import __version__, rundir
from mswift.converters import execute
from mswift.converters.destinations import Destination, HfDestination, MegatronDestination
from mswift.converters.finish import finish
from mswift.converters.io.files import Unreadable, in_words
from mswift.converters.io.partial import Identity, Partial
from mswift.converters.io.side_files import MANIFEST, identity_of
from mswift.converters.journal import Done
from mswift.converters.manifest import DroppedRecord, Manifest, read_manifest
from mswift.converters.measured import Measured
from mswift.converters.sources import Source, SourceOptions, open_source
from mswift.converters.work import part_of, units_of
from mswift.converters.workers import default_workers
from mswift.errors import CheckpointError, MswiftError

Format = Literal["megatron", "hf"]
MAX_SHARD_BYTES = 5_000_000_000


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


def plan(src: Path, to: Format, options: SourceOptions | None = None) -> Plan:
    """Reads config.json and headers only; refuses what the table of the family does not cover exactly once."""
    source = open_source(src, options or SourceOptions())
    recorded = read_manifest(source.path)
    if recorded is not None and set(recorded.tensors) != set(source.table.hf):
        raise CheckpointError(
            f"{src / MANIFEST}: lists {len(recorded.tensors)} tensors, the model has {len(source.table.hf)}: the "
            "directory was changed after mswift wrote it; remove the manifest if that was meant"
        )
    dropped = dict(recorded.dropped) if recorded else {}
    if recorded is None and (source.path / rundir.STATE).is_file():
        table = source.table  # a run's checkpoint does not say which copies the published files hold
        dropped = {n: DroppedRecord(table.dropped[n].reason, same) for n, same in table.mtp_copies.items()}
    for name, reason in source.dropped.items():
        dropped[name] = DroppedRecord(reason, source.repeats.get(name))
    return Plan(source, to, recorded, dropped)


class Flags(TypedDict, total=False):
    """How to convert; what is left out has the default of `mswift convert`."""

    progress: bool
    max_shard_bytes: int
    num_workers: int | None
    hash_source: bool
    source_options: SourceOptions


def convert(
    src: Path, dst: Path, to: Format, *, hash_output: bool = False, restart: bool = False, **flags: Unpack[Flags]
) -> Manifest:
    """Writes the model in `src` (HF directory, converted directory or checkpoint) to the new directory `dst`.

    `dst` appears whole, by rename, or not at all. After a kill or a full disk the same call continues where that one
    was (`restart`: begins anew). ConfigError if `dst` exists; CheckpointError if the source is damaged or the disk
    full. Memory: 3 MiB a worker, 64 MiB in all for transposed tensors, plus O(number of tensors).
    """
    job = _Job.of(src, dst, to, flags)
    done = job.copy(1, 1, restart)
    return job.publish(done, hash_output)


def convert_part(
    src: Path, dst: Path, to: Format, part: int, parts: int, *, restart: bool = False, **flags: Unpack[Flags]
) -> int:
    """Copies part `part` (from 1) of `parts` beside `dst`, continuing an earlier try; returns the part's bytes.

    Parts are independent: on any node that sees both directories, at any time, in any order. `restart` removes what
    all parts have copied.
    """
    job = _Job.of(src, dst, to, flags)
    done = job.copy(part, parts, restart)
    job.close()
    return done.num_bytes


def finish_parts(src: Path, dst: Path, to: Format, *, hash_output: bool = False, **flags: Unpack[Flags]) -> Manifest:
    """Proves that every part is there, every tensor exactly once, and publishes `dst`.

    CheckpointError naming the parts that are missing or incomplete.
    """
    job = _Job.of(src, dst, to, flags)
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
        self._total = sum(unit.num_bytes for unit in self.units)
        reading = (planned.source.ignored, planned.source.config_edits, planned.source.decoded)
        known = [__version__, planned.to, options.hash_source, sorted(planned.restored), reading]
        folders = dict.fromkeys((planned.source.path, planned.source.hf_files))
        self._source_state = partial_of(identity_of, folders)
        self._state_then = self._source_state()
        text = json.dumps([known, list(destination.sizes.items()), self._state_then])
        self.identity = hashlib.sha256(text.encode()).hexdigest()

    @staticmethod
    def of(src: Path, dst: Path, to: Format, flags: Flags) -> "_Job":
        """Plans everything; nothing is written."""
        planned, partial = plan(Path(src), to, flags.get("source_options", SourceOptions())), Partial(Path(dst))
        workers = flags.get("num_workers") or default_workers()
        options = execute.Options(flags.get("hash_source", True), workers, flags.get("progress", False))
        destination = _destination(planned, partial.data, flags.get("max_shard_bytes", MAX_SHARD_BYTES))
        return _Job(planned, destination, partial, options)

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
            promised = {name: measured.blake3 for name, measured in self._recorded().items()}
            return execute.run(self.planned.source, promised, self.destination, units, journal, self.options)

    def publish(self, done: Done, hash_output: bool, *, keep: bool = False) -> Manifest:
        """Index, side files, proof and manifest, then the rename."""
        with self.worded(keep=keep):
            source, recorded = self.planned.source, self._recorded()
            measured = {name: done.measured.get(name, recorded.get(name)) for name in source.order}
            manifest = finish(source, self.destination, measured, self.planned.dropped, self.options, hash_output)
            manifest = manifest.timed(time.perf_counter() - self.started)
            manifest.write(self.destination.directory)
            if self._source_state() != self._state_then:
                raise CheckpointError(f"{source.path}: was changed while it was converted; convert it again")
            self.partial.publish()
        self.close()
        return manifest

    def _recorded(self) -> dict[str, Measured]:
        """What the source's manifest says of the tensors that are taken as they are stored."""
        recorded = self.planned.recorded.tensors if self.planned.recorded else {}
        decoded = self.planned.source.decoded
        known = {name: record.measured for name, record in recorded.items() if name not in decoded}
        return {name: measured for name, measured in known.items() if measured is not None}

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
            passing = not isinstance(error, MswiftError) or isinstance(error, execute.NoSpace | Unreadable)
            kept = keep or (done > 0 and passing)
            if not kept:
                self.partial.discard()
            self.close()
            state = "nothing was published"
            if kept:
                state += (
                    f", {done:,} of {self._total:,} bytes are copied and kept in {self.partial.path}: "
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
