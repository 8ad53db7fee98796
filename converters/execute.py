"""The copying itself: workers take units, stream them, and have them recorded; a rerun does what is not recorded."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from mswift.converters.copying import check_written, copy_span, is_transposed, opened, placed, stream
from mswift.converters.destinations import Destination
from mswift.converters.io.descriptors import Descriptors, SizedFiles
from mswift.converters.io.files import WIDE_BYTES, write_exactly
from mswift.converters.io.partial import Partial
from mswift.converters.io.side_files import MANIFEST
from mswift.converters.journal import Done, Record, Recorder, read_journal
from mswift.converters.measured import Measured, Measuring
from mswift.converters.sources import Place, Source
from mswift.converters.work import FRAME, Schedule, Unit, parts_of, span_bytes, spans
from mswift.converters.workers import Buffers, progress_bar, run_all
from mswift.errors import CheckpointError


class NoSpace(CheckpointError):
    """The disk cannot hold the result; what is copied stays, for the same command to continue."""


@dataclass(frozen=True)
class Options:
    """How to copy; nothing of it changes the bytes."""

    hash_source: bool
    num_workers: int
    progress: bool


def run(
    source: Source,
    promised: Mapping[str, str],
    destination: Destination,
    units: Sequence[Unit],
    journal: Path,
    options: Options,
) -> Done:
    """Copies the units that the journal does not have; returns the journal afterwards.

    `promised`: hashes of the source's own manifest. CheckpointError if the source does not have them.
    """
    total = sum(unit.num_bytes for unit in units)
    files, sources = SizedFiles(destination.directory, destination.sizes), Descriptors()
    done = _still_there(read_journal(journal), destination, units, journal)
    todo = [unit for unit in units if done.fault(unit.name, unit.num_bytes) is not None]
    _check_space(destination, {unit.file for unit in units})
    recorder = Recorder(journal, total, partial(_sync, files))
    failed = True
    try:
        with progress_bar(total, f"to {destination.format}", options.progress) as advance:
            advance(done.num_bytes)
            step = span_bytes(total)
            work = _Worker(
                *(source, promised, destination, files, sources, done, recorder, step, options.hash_source, advance),
                *(lru_cache(4 * options.num_workers)(side.places) for side in (source, destination)),
            )
            if not options.hash_source:
                todo = [part for unit in todo for part in _split(unit, step)]
            run_all(Schedule(todo), work, options.num_workers)
        failed = False
    finally:
        recorder.close(failed=failed)
        files.close()
        sources.close()
    return read_journal(journal)


def _split(unit: Unit, step: int) -> Iterable[Unit]:
    return (replace(unit, low=low, high=high) for low, high in spans(unit.low, unit.high, step))


def _sync(files: SizedFiles, names: Iterable[str]) -> None:
    for path in map(files.directory.joinpath, names):
        with files.held([path]) as fds:
            os.fdatasync(fds[path])


@dataclass(frozen=True)
class _Worker:
    """Copies one unit; called by several threads."""

    source: Source
    promised: Mapping[str, str]
    destination: Destination
    files: SizedFiles
    sources: Descriptors
    done: Done
    recorder: Recorder
    step: int
    hashing: bool
    advance: Callable[[int], None]
    places_from: Callable[[str], Sequence[Place]]
    places_to: Callable[[str], Sequence[Place]]

    def __call__(self, unit: Unit, buffers: Buffers) -> None:
        if unit.name.startswith(FRAME):
            self._frame(unit)
            return
        places = self.places_to(unit.name)
        names = sorted({place.path.name for place in places})
        finished = set(self.done.spans.get(unit.name, ()))
        original = self.destination.copies.get(unit.name, unit.name)
        measuring = Measuring(self.source.dtype_of(original)) if self.hashing and original == unit.name else None
        with opened(self.source, original, self.sources, self.places_from) as tensor, placed(places, self.files) as to:
            step = max(self.step, WIDE_BYTES) if is_transposed(tensor.direct(), to) else self.step
            for low, high in spans(unit.low, unit.high, step):
                if buffers.stop.is_set():
                    return
                there = (low, high) in finished
                if measuring is not None:
                    written = stream(tensor, low, high, () if there else to, buffers, measuring)
                    check_written(tensor.name, written, 0 if there else high - low)
                elif not there:
                    copy_span(tensor, low, high, to, buffers)
                if not there:
                    found = self._checked(unit.name, measuring) if measuring and high == unit.high else None
                    self.recorder.done(Record(unit.name, low, high, found), names)
                    self.advance(high - low)

    def _frame(self, unit: Unit) -> None:
        path = self.files.directory / unit.file
        with self.files.held([path]) as fds:
            for offset, data in self.destination.frame(unit.file):
                write_exactly(fds[path], memoryview(data), offset)
        self.recorder.done(Record(unit.name, 0, 0), [unit.file])

    def _checked(self, name: str, measuring: Measuring) -> Measured:
        found = measuring.result()
        if self.promised.get(name, found.blake3) != found.blake3:
            raise CheckpointError(
                f"{self.source.path}: {name} has BLAKE3 {found.blake3}, but the manifest there says "
                f"{self.promised[name]}: the files were damaged, or changed (if that was meant, remove {MANIFEST})"
            )
        return found


def _still_there(done: Done, destination: Destination, units: Sequence[Unit], journal: Path) -> Done:
    """The journal, if the files that it speaks of have their size; else nothing is done."""
    for file in {unit.file for unit in units if unit.name in done.spans}:
        path = destination.directory / file
        if not path.is_file() or path.stat().st_size != destination.sizes[file]:
            raise CheckpointError(f"{path}: is not what {journal} says was written; begin anew with --restart")
    return done


def _check_space(destination: Destination, files: set[str]) -> None:
    """CheckpointError unless the disk can hold what these files still lack."""
    directory = destination.directory
    there = sum(path.stat().st_blocks * 512 for path in map(directory.joinpath, files) if path.exists())
    needed = sum(destination.sizes[file] for file in files) - there
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise NoSpace(
            f"--output_dir {directory.parent.parent}: the disk is full: {needed:,} bytes are needed, {free:,} are "
            "free; free some space or name a directory on another disk"
        )


def recorded_bytes(directory: Partial) -> int:
    """Bytes that all journals of a partial directory have; 0 if one of them is damaged."""
    try:
        return sum(read_journal(path).num_bytes for path in directory.path.glob("part-*.journal"))
    except (CheckpointError, OSError):
        return 0


def gather_parts(directory: Partial, parts: int, units: Sequence[Unit]) -> Done:
    """All journals as one; CheckpointError naming the parts that lack something."""
    whole, lacking, example = Done(), [], ""
    owners = parts_of(units, parts)
    theirs: dict[int, list[Unit]] = {}
    for unit in units:
        theirs.setdefault(owners[unit.file], []).append(unit)
    for part in range(1, parts + 1):
        done = read_journal(directory.journal(part, parts))
        mine = theirs.get(part, [])
        strange = done.spans.keys() - {unit.name for unit in mine}
        if strange:
            raise CheckpointError(
                f"{directory.journal(part, parts)}: records {min(strange)!r}, which is another part's"
            )
        for unit in mine:
            fault = done.fault(unit.name, unit.num_bytes)
            if fault is not None:
                example = example or f"{unit.name.replace(FRAME, 'the frame of ')} {fault}"
                lacking.append(part)
                break
        whole.spans |= done.spans
        whole.measured |= done.measured
    if lacking:
        flags = " ".join(f"--part {part}/{parts}" for part in lacking)
        raise CheckpointError(
            f"--finish: {len(lacking)} of {parts} parts of {directory.destination} are not complete ({example}); "
            f"run the command with {flags}, then --finish again"
        )
    return whole
