"""A plain .txt file, which is one document, in portions, so that a run can stop and go on inside of it.

A portion ends at a cut that is proved as those of `documents` are, in the text around it alone. Which cuts there are
depends on the file and on the place where the portion begins.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from mswift.data.text_files import LongText, decoded

PORTION_BYTES = 1 << 26
_WINDOW_BYTES = 1 << 20
"""Before the end of a portion; its second half is searched for a cut."""
_AFTER_CHARACTERS = 1024

Cut = Callable[[str, int], int | None]
"""(text, end) -> the last proved cut in text[:end], None where there is none."""


def has_portions(path: Path) -> bool:
    """Whether `portions` reads it."""
    return path.suffix.lower() == ".txt"


def portions(path: Path, offset: int, cut: Cut) -> Iterator[LongText]:
    """The text behind `offset` bytes; the last portion has no `end`."""
    size = path.stat().st_size
    while True:
        end = _next_cut(path, offset, size, cut)
        yield LongText(path, offset, end)
        if end is None:
            return
        offset = end


def _next_cut(path: Path, start: int, size: int, cut: Cut) -> int | None:
    """Byte of the next cut; None: the rest is one portion."""
    end = start + PORTION_BYTES
    while end < size:
        first = max(start, end - _WINDOW_BYTES)
        try:
            before, first = decoded(path, first, end)
            text, _ = decoded(path, first, end + 4 * _AFTER_CHARACTERS)
        except UnicodeDecodeError:
            return None  # said where it is read
        found = cut(text, len(before))
        if found:
            return first + len(text[:found].encode())
        end += _WINDOW_BYTES
    return None
