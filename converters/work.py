"""The work of a conversion as units: their sizes, their order, whose part they are."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

from mswift.converters.destinations import Destination

LARGEST_SPAN_BYTES = 64 << 20
SMALLEST_SPAN_BYTES = 1 << 20
SPANS = 512
"""About so many spans in a conversion: what a kill interrupts is a small share of it."""

FRAME = "\0"
"""Prefix of the unit that writes what a file holds besides tensors; no tensor's name begins with it."""


@dataclass(frozen=True)
class Unit:
    """Bytes [low, high) of an HF tensor, or (name = FRAME + file) the frame of a file; `file` is its home."""

    name: str
    low: int
    high: int
    file: str

    @property
    def num_bytes(self) -> int:
        return self.high - self.low


def span_bytes(total: int) -> int:
    """Bytes that are copied between two entries in the journal."""
    size = total // SPANS // SMALLEST_SPAN_BYTES * SMALLEST_SPAN_BYTES
    return max(SMALLEST_SPAN_BYTES, min(LARGEST_SPAN_BYTES, size))


def spans(low: int, high: int, step: int) -> Iterator[tuple[int, int]]:
    """(low, high) of the spans of a unit; an empty one has one."""
    for start in range(low, max(low + 1, high), step):
        yield start, min(high, start + step)


def units_of(destination: Destination, order: Sequence[str], num_bytes: Callable[[str], int]) -> list[Unit]:
    """One unit for each tensor and each file's frame: file after file, within a file in the source's order.

    Tensors that the destination repeats are units too, of the file that they are in.
    """
    files = {file: [Unit(FRAME + file, 0, 0, file)] for file in destination.sizes}
    for name, original in [*((name, name) for name in order), *destination.copies.items()]:
        home = destination.home(name)
        files[home].append(Unit(name, 0, num_bytes(original), home))
    return [unit for units in files.values() for unit in units]


def parts_of(units: Sequence[Unit], parts: int) -> dict[str, int]:
    """File -> the part (from 1) of `parts` that writes it: whole files, so that two nodes never write to the same page.

    Parts are about equal in bytes; some are empty if there are more parts than files.
    """
    sizes: dict[str, int] = {}
    for unit in units:
        sizes[unit.file] = sizes.get(unit.file, 0) + unit.num_bytes
    total, before = sum(sizes.values()), 0
    owners = {}
    for number, (file, size) in enumerate(sizes.items()):
        middle, of = (2 * before + size, 2 * total) if total else (2 * number + 1, 2 * len(sizes))
        owners[file] = min(parts - 1, middle * parts // of) + 1
        before += size
    return owners


def part_of(units: Sequence[Unit], part: int, parts: int) -> list[Unit]:
    """The units of part `part` (from 1) of `parts`."""
    owners = parts_of(units, parts)
    return [unit for unit in units if owners[unit.file] == part]


class Schedule:
    """Deals units to workers: each keeps to its own file while there is one (two writers of a file wait)."""

    def __init__(self, units: Iterable[Unit]) -> None:
        self._waiting: dict[str, list[Unit]] = {}
        for unit in units:
            self._waiting.setdefault(unit.file, []).append(unit)
        for waiting in self._waiting.values():
            waiting.reverse()
        self._left = {file: sum(u.num_bytes for u in waiting) for file, waiting in self._waiting.items()}
        self._file: dict[int, str] = {}
        self._lock = Lock()

    def take(self, worker: int) -> Unit | None:
        """The next unit of that worker; None if nothing is left."""
        with self._lock:
            file = self._file.get(worker)
            if file is None or file not in self._waiting:
                file = self._choose(worker)
            if file is None:
                return None
            unit = self._waiting[file].pop()
            self._left[file] -= unit.num_bytes
            if not self._waiting[file]:
                del self._waiting[file]
            return unit

    def _choose(self, worker: int) -> str | None:
        """The first file that nobody writes, else the one with most left."""
        self._file.pop(worker, None)
        taken = set(self._file.values())
        free = next((file for file in self._waiting if file not in taken), None)
        file = free or max(self._waiting, key=self._left.__getitem__, default=None)
        if file is not None:
            self._file[worker] = file
        return file
