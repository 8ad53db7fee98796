"""Tokens to text, one token at a time, without cutting a character or losing a space."""

from collections.abc import Sequence
from typing import Any, Protocol

_BROKEN = "�"  # what a decoder writes for bytes that are no character yet
_CONTEXT_TOKENS = 6  # a byte-fallback character has at most 4; decoders look one token back for spaces


class Decoder(Protocol):
    """The part of a tokenizer that is used here."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str:
        """Text of the tokens."""


class Showing:
    """A decoder that leaves all control tokens out but these."""

    def __init__(self, tokenizer: Any, shown: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._left_out = {number for number, token in added if token.special and token.content not in shown}

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of the tokens."""
        left = [token for token in token_ids if token not in self._left_out]
        return str(self._tokenizer.decode(left, skip_special_tokens=False))


class Detokenizer:
    """Text of a growing answer; the pieces joined are the text of the whole.

    `context` are the tokens before the answer where it continues a text: they decide whether it starts with a space.
    """

    def __init__(self, decoder: Decoder, context: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._tokens = list(context[-_CONTEXT_TOKENS:])
        self._start = 0  # tokens before are needed no more
        self._shown = len(self._tokens)  # tokens whose text was given out

    def add(self, token: int) -> str:
        """Take the next token; return the text that it completes, perhaps none."""
        self._tokens.append(token)
        text = self._pending()
        if not text or text.endswith(_BROKEN):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return text

    def finish(self) -> str:
        """Text still held back: bytes that never became a character, as the decoder shows them."""
        text = self._pending()
        self._start, self._shown = self._shown, len(self._tokens)
        return text

    def _pending(self) -> str:
        before = self._decode(self._tokens[self._start : self._shown])
        return self._decode(self._tokens[self._start :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._decoder.decode(tokens, skip_special_tokens=True)


class StopFinder:
    """Looks for stop texts in pieces; text that may be the start of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """Take a piece; return what may be shown. After a stop text was `found` the rest is dropped."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.found = True
            self._held = ""
            return text[: min(places)]
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The held text: no stop text will complete it."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        for size in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0
