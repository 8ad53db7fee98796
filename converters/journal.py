"""What of a conversion is done, on the disk: a line for every span whose bytes are durable, and nobody else's."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Thread

from mswift.converters.measured import Measured
from mswift.errors import CheckpointError

_SHORTEST_WAIT_SECONDS = 0.2
_LEAST_UNRECORDED_BYTES = 32 << 20
_MOST_UNRECORDED_BYTES = 1 << 30
_UNRECORDED_SHARE = 40


@dataclass(frozen=True)
class Record:
    """Bytes [low, high) of a unit are written and durable; what was measured of the tensor comes with the last ones."""

    name: str
    low: int
    high: int
    measured: Measured | None = None


@dataclass
class Done:
    """The records of one or several journals."""

    spans: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    measured: dict[str, Measured] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(high - low for spans in self.spans.values() for low, high in spans)

    def add(self, record: Record) -> None:
        """Takes one record in."""
        self.spans.setdefault(record.name, []).append((record.low, record.high))
        if record.measured is not None:
            self.measured[record.name] = record.measured

    def fault(self, name: str, size: int) -> str | None:
        """None if the spans cover [0, size) exactly once, else what is wrong, in words."""
        position = 0
        if name not in self.spans:
            return "is not recorded"
        for low, high in sorted(self.spans[name]):
            if low != position:
                return f"bytes {position}:{low} are missing" if low > position else f"byte {low} is recorded twice"
            position = high
        if position > size:
            return f"bytes {size}:{position} are too many"
        return None if position == size else f"bytes {position}:{size} are missing"


def read_journal(path: Path) -> Done:
    """The records of a journal; a last line that a crash cut off does not count. CheckpointError if it is damaged."""
    done = Done()
    try:
        *lines, _ = path.read_text("utf-8").split("\n")
    except FileNotFoundError:
        return done
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            name, low, high, *measured = json.loads(line)
            done.add(Record(str(name), int(low), int(high), Measured(*measured) if measured else None))
        except (ValueError, TypeError):
            raise CheckpointError(f"{path}: line {number} is damaged; begin anew with --restart") from None
    return done


def _line(record: Record) -> list[str | int]:
    measured = record.measured
    return [record.name, record.low, record.high, *(() if measured is None else (measured.blake3, measured.non_finite))]


class Recorder:
    """Makes finished spans durable and records them, in batches, while others are copied.

    Not more than a fortieth of all bytes is ever unrecorded (32 MiB to 1 GiB): workers wait. `sync(paths)` makes the
    data of files durable.
    """

    def __init__(self, path: Path, total: int, sync: Callable[[Iterable[str]], None]) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._fd).st_size
        with open(path, "rb") as file:
            os.ftruncate(self._fd, file.read().rfind(b"\n") + 1 if size else 0)  # without what a crash cut off
        self._sync = sync
        self._limit = max(_LEAST_UNRECORDED_BYTES, min(_MOST_UNRECORDED_BYTES, total // _UNRECORDED_SHARE))
        self._changed = Condition()
        self._waiting: list[tuple[Record, Sequence[str]]] = []
        self._unrecorded = 0
        self._closing = False
        self._error: BaseException | None = None
        self._thread = Thread(target=self._loop, daemon=True)
        self._thread.start()

    def done(self, record: Record, files: Sequence[str]) -> None:
        """Says that the record's bytes are written to these files; raises what went wrong with earlier ones."""
        with self._changed:
            self._waiting.append((record, files))
            self._unrecorded += record.high - record.low
            if 4 * self._unrecorded > self._limit:
                self._changed.notify_all()
            while self._unrecorded > self._limit and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise self._error

    def close(self, *, failed: bool = False) -> None:
        """Records what is left; raises what went wrong, unless something else has `failed` before."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        os.close(self._fd)
        if self._error is not None and not failed:
            raise self._error

    def _loop(self) -> None:
        while True:
            with self._changed:
                if not self._closing and 4 * self._unrecorded <= self._limit:
                    self._changed.wait(_SHORTEST_WAIT_SECONDS)
                batch, self._waiting = self._waiting, []
                if not batch and self._closing:
                    return
            try:
                self._record(batch)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return

    def _record(self, batch: Sequence[tuple[Record, Sequence[str]]]) -> None:
        if not batch:
            return
        self._sync(sorted({file for _, files in batch for file in files}))
        lines = [json.dumps(_line(r)) + "\n" for r, _ in batch]
        text = memoryview("".join(lines).encode())
        while text:
            text = text[os.write(self._fd, text) :]
        os.fdatasync(self._fd)
        with self._changed:
            self._unrecorded -= sum(r.high - r.low for r, _ in batch)
            self._changed.notify_all()
