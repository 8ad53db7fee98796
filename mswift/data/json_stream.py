"""The values of one JSON array, or of JSON values one after the other, without holding the whole text."""

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from mswift.errors import DataError

_NEAR_THE_END = 12  # characters; longer than any escape or literal that the end of a piece can cut
_SPACE = " \t\n\r"


def checked_value(value: Any, text: str, where: str) -> Any:
    """`value`, or a DataError where its source `text` escapes half a surrogate pair, which no encoding can write."""
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return DataError(f"{where}: JSON that cannot be read ({error}); mend or remove it")
    return value


def json_values(pieces: Iterator[str], path: str) -> Iterator[Any]:
    """Values in order; a value that no encoding can write comes as its DataError. Raises DataError at bad JSON."""
    scanner = _Scanner(pieces, path)
    array = scanner.peek() == "["
    if array:
        scanner.take()
    number = 0
    while (character := scanner.peek()) and not (array and character == "]"):
        if array and number:
            if character != ",":
                scanner.fail("Expecting ',' delimiter")
            scanner.take()
            scanner.peek()
        number += 1
        yield scanner.value(f"{path}, row {number}")
    if array:
        if not character:
            scanner.fail("the array has no end")
        scanner.take()
        if scanner.peek():
            scanner.fail("text behind the end of the array")


class _Scanner:
    """A window on the text; what lies before the current value is given up."""

    def __init__(self, pieces: Iterator[str], path: str) -> None:
        self._pieces, self._path = pieces, path
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0
        self._lines, self._column = 0, 0  # line breaks before the window, and characters since the last of them

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            text = self._text
            while self._at < len(text) and text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self) -> None:
        """Go over one character."""
        self._at += 1

    def value(self, where: str) -> Any:
        """The value that starts here."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._text) - _NEAR_THE_END or error.msg.startswith("Unterminated string")
                distance = error.pos - self._at
                if not (cut and self._more()):
                    self.fail(error.msg, self._at + distance)
                continue
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: JSON that cannot be read ({error}); mend or remove it") from None
            if end < len(self._text) or self._text[end - 1] in '}]"':
                start, self._at = self._at, end
                return checked_value(value, self._text[start:end], where)
            if not self._more():  # a number at the very end
                self._at = len(self._text)
                return value

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        """Raise a DataError with line and column."""
        before = self._text[: self._at if position is None else position]
        line = self._lines + before.count("\n") + 1
        column = len(before) - before.rfind("\n") + (0 if "\n" in before else self._column)
        raise DataError(
            f"{self._path}, line {line}, column {column}: bad JSON ({message}); "
            "the file must hold one object per line, or one array of objects"
        )

    def _more(self) -> bool:
        """Take in as much again as is held, so that a long value is parsed a few times only; False at the end."""
        gone, kept = self._text[: self._at], self._text[self._at :]
        self._lines += gone.count("\n")
        self._column = len(gone) - gone.rfind("\n") - 1 if "\n" in gone else self._column + len(gone)
        added: list[str] = []
        size = 0
        for piece in self._pieces:
            added.append(piece)
            size += len(piece)
            if size >= len(kept):
                break
        self._text, self._at = kept + "".join(added), 0
        return bool(added)
