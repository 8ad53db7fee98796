"""A place in the rows of a list of files, and reading on from it.

Plain .jsonl (and .json with a value a line) goes on at a byte offset, without reading what lies before, and so does a
plain .txt, between portions of its one document. Every other kind of file has no offset from which its rows can be
told, so its rows are skipped, and how fast is said.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from mswift.data.formats import Record, has_offsets, read_lines
from mswift.data.portions import Cut, has_portions, portions
from mswift.data.sources import LocalFile, Part
from mswift.data.text_files import LongText


@dataclass(frozen=True)
class Place:
    """What lies before a row: so many whole files, then of the next one so many rows, lines and bytes."""

    file: int = 0
    row: int = 0
    line: int = 0
    """0 in a file without offsets."""
    offset: int = 0
    """Likewise."""


@dataclass(frozen=True)
class Bounds:
    """How much is taken at once: it ends behind the row that reaches one of them."""

    rows: int
    size: int
    """Bytes of a file with offsets, or else about as many characters of the values."""


class Cursor:
    """Reads files on and on from a place; one that is open stays open between two calls of `take`."""

    def __init__(self, parts: Sequence[Part], place: Place, say: Callable[[str], None], cut: Cut | None = None) -> None:
        """`cut` finds where a text may be cut; without it none is."""
        self._parts, self._say, self._cut = parts, say, cut
        self.place = place
        """Behind the last row that was given."""
        self._open: Iterator[tuple[Record, int, Place]] | None = None

    @property
    def at_end(self) -> bool:
        """Whether every file was read."""
        return self.place.file == len(self._parts)

    def take(self, bounds: Bounds) -> Iterator[tuple[str, Iterator[Record]]]:
        """The next rows, file by file (its name, its rows); the rows of one are read before the next is asked for."""
        left = [bounds.rows, bounds.size]
        while not self.at_end and min(left) > 0:
            yield self._parts[self.place.file].name, self._rows(left)

    def _rows(self, left: list[int]) -> Iterator[Record]:
        part, number = self._parts[self.place.file], self.place.file
        self._open = self._open or _rows_from(part, self.place, self._say, self._cut)
        while min(left) > 0:
            found = next(self._open, None)
            if found is None:
                self.place, self._open = Place(number + 1), None
                return
            record, size, self.place = found
            left[0] -= 1
            left[1] -= size
            yield record


def _rows_from(
    part: Part, place: Place, say: Callable[[str], None], cut: Cut | None
) -> Iterator[tuple[Record, int, Place]]:
    """The rows of a file behind `place` (or portions of the one it has): each with its size and the place behind it."""
    if isinstance(part, LocalFile) and cut is not None and has_portions(part.path):
        for text in portions(part.path, place.offset, cut) if place.row == 0 else ():
            end = part.path.stat().st_size if text.end is None else text.end
            record = Record(1, f"{part.path}, row 1", {"text": text})
            yield record, end - text.start, Place(place.file, int(text.end is None), 0, end)
        return
    if isinstance(part, LocalFile) and has_offsets(part.path):
        before = place.offset
        for record, line in read_lines(part.path, place.row, place.line, place.offset):
            yield record, line.end - before, Place(place.file, record.number, line.number, line.end)
            before = line.end
        return
    for record in _skipped(part, place.row, say):
        yield record, _size(record), Place(place.file, record.number)


def _skipped(part: Part, rows: int, say: Callable[[str], None]) -> Iterator[Record]:
    records = part.records()
    if rows:
        started = time.perf_counter()
        found = sum(1 for _ in islice(records, rows))
        seconds = time.perf_counter() - started
        say(
            f"--streaming: {found:,} rows of {part} were skipped in {seconds:.1f} s "
            f"({found / max(seconds, 1e-9):,.0f} rows/s); rows of a plain .jsonl file are found at once"
        )
    yield from records


def _size(record: Record) -> int:
    values = (record.row or {}).values()
    return sum(value.path.stat().st_size if isinstance(value, LongText) else len(str(value)) for value in values)
