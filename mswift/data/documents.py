"""Texts of any length -> pieces whose tokens join to those of the whole text, so that memory is bounded.

A tokenizer needs a hundred times the memory of a text, so a long text is encoded in pieces of 256K characters. A cut is
tried where a line begins, then before a space, then anywhere, from the right; it stands if the tokens of what is
before it are the beginning of the tokens of both sides together, and the rest of those the same behind three contexts
of different lengths (a tokenizer that counts digits in threes has no cut within a number). Each piece is encoded behind
the context before it, whose tokens are then taken off: a tokenizer that marks the start of a text does not mark that of
a piece.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from mswift.data.text_files import LongText
from mswift.data.tokenizer import Tokenizer, encode
from mswift.errors import DataError

LONG_CHARACTERS = 1 << 18
_CONTEXT_CHARACTERS = (1024, 1023, 1022)
_MOST_CHARACTERS = 1 << 23
_PLACES = (re.compile(r"(?<=\n)(?=\S)"), re.compile(r"(?<=\S)(?=\s)"), re.compile(r"(?=.)", re.DOTALL))
_TRIES = 32


@dataclass(frozen=True)
class LongPiece:
    """A part of a document."""

    context: str
    """What comes before, "" at the beginning."""
    text: str
    is_last: bool
    where: str


def is_long(text: str | LongText) -> bool:
    """Whether it is encoded in pieces."""
    return isinstance(text, LongText) or len(text) > LONG_CHARACTERS


def long_pieces(tokenizer: Tokenizer, text: str | LongText, where: str) -> Iterator[LongPiece]:
    """The pieces of a text; none of an empty one. DataError where 8M characters have no place for a cut.

    No piece of a portion is the last of its document, but for those of the last portion.
    """
    context, ends = (
        (text.context(_CONTEXT_CHARACTERS[0]), text.end is None) if isinstance(text, LongText) else ("", True)
    )
    held = ""
    for piece in _cut_pieces(tokenizer, text, where):
        if held:
            yield LongPiece(context, held, False, where)
            context = (context + held)[-_CONTEXT_CHARACTERS[0] :]
        held = piece
    if held:
        yield LongPiece(context, held, ends, where)


def encode_piece(tokenizer: Tokenizer, piece: LongPiece) -> list[int]:
    """Token ids of a piece as part of its document."""
    before, ids = encode(tokenizer, [piece.context, piece.context + piece.text])
    if ids[: len(before)] != before:
        raise _no_cut(piece.where, len(piece.text))
    return ids[len(before) :]


def _no_cut(where: str, count: int) -> DataError:
    return DataError(
        f"{where}: its tokens depend on each other over {count:,} characters, so no cut is safe; "
        "put line breaks or spaces in the text"
    )


def _cut_pieces(tokenizer: Tokenizer, text: str | LongText, where: str) -> Iterator[str]:
    """The text between proved cuts."""
    held, wanted = "", LONG_CHARACTERS
    for piece in text.pieces() if isinstance(text, LongText) else _slices(text):
        held += piece
        while len(held) >= wanted + _CONTEXT_CHARACTERS[0]:
            cut = proved_cut(tokenizer, held, wanted)
            if cut is not None:
                yield held[:cut]
                held, wanted = held[cut:], LONG_CHARACTERS
            elif wanted >= _MOST_CHARACTERS:
                raise _no_cut(where, wanted)
            else:
                wanted *= 2
    if held:
        yield held


def _slices(text: str) -> Iterator[str]:
    for start in range(0, len(text), LONG_CHARACTERS):
        yield text[start : start + LONG_CHARACTERS]


def proved_cut(tokenizer: Tokenizer, text: str, end: int) -> int | None:
    """The last proved cut of those that are tried in the second half of text[:end]."""
    for place in _PLACES:
        for found in islice(_from_the_right(place, text, end // 2, end), _TRIES):
            if _is_proved(tokenizer, text, found):
                return found
    return None


def _from_the_right(place: re.Pattern[str], text: str, start: int, end: int) -> Iterator[int]:
    """Positions of empty matches in [start, end), the last first."""
    step = 4096
    for high in range(end, start, -step):
        found = [match.start() for match in place.finditer(text, max(high - step, start), high)]
        yield from reversed([position for position in found if position < high])


def _is_proved(tokenizer: Tokenizer, text: str, cut: int) -> bool:
    after = text[cut : cut + _CONTEXT_CHARACTERS[0]]
    contexts = [text[max(cut - length, 0) : cut] for length in _CONTEXT_CHARACTERS]
    encoded = encode(tokenizer, contexts + [context + after for context in contexts])
    before, joined = encoded[: len(contexts)], encoded[len(contexts) :]
    rests = [ids[len(start) :] for start, ids in zip(before, joined, strict=True) if ids[: len(start)] == start]
    return len(rests) == len(contexts) and all(rest == rests[0] for rest in rests)
