"""Single tokens as text and bytes, each different from the others."""

import json
import re
from collections.abc import Sequence
from typing import Any

from mswift.infer.request import TokenLogprob
from mswift.infer.server.schema import ChoiceLogprobs, CompletionLogprobs, TokenLogprobs, TopLogprob

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """The bytes that a token stands for, whole characters or not; a control token stands for its own name."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.dumps(json.loads(backend.to_str()).get("decoder")) if backend is not None else ""
        self._bytes_of = _byte_alphabet() if '"ByteLevel"' in decoder else None
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """The token's bytes; none for an id without a token."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def _find(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token) if token < len(self._tokenizer) else None
        if piece is None:
            return b""
        if token in self._special:
            return str(piece).encode()
        if fallback := _FALLBACK.fullmatch(piece):
            return bytes([int(fallback[1], 16)])
        if self._bytes_of is not None and all(character in self._bytes_of for character in piece):
            return bytes(self._bytes_of[character] for character in piece)
        return str(piece).replace("▁", " ").encode()

    def text_of(self, token: int) -> str:
        """The token's text; bytes that are no character as OpenAI wrote them: `bytes:\\xf0\\x9f`."""
        data = self.bytes_of(token)
        piece = self._tokenizer.convert_ids_to_tokens(token) if token < len(self._tokenizer) else ""
        try:
            if not _FALLBACK.fullmatch(piece):  # such a byte would look like the letter that has a token, too
                return data.decode()
        except UnicodeDecodeError:
            pass
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def of_chat(self, entries: Sequence[TokenLogprob]) -> ChoiceLogprobs:
        """As chat completions tell log-probabilities."""
        return ChoiceLogprobs(
            content=[
                TokenLogprobs(
                    **self._one(entry.token, entry.logprob),
                    top_logprobs=[TopLogprob(**self._one(*top)) for top in entry.top],
                )
                for entry in entries
            ]
        )

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.text_of(token), "logprob": finite(logprob), "bytes": list(self.bytes_of(token))}

    def of_completion(self, entries: Sequence[TokenLogprob | int], offset: int = 0) -> CompletionLogprobs:
        """As completions tell them, from the character `offset` on; an int is a first token, which follows nothing."""
        told = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for entry in entries:
            token = entry if isinstance(entry, int) else entry.token
            text = self.text_of(token)
            told.tokens.append(text)
            told.text_offset.append(offset)
            offset += len(text)
            if isinstance(entry, int):
                told.token_logprobs.append(None)
                told.top_logprobs.append(None)
            else:
                told.token_logprobs.append(finite(entry.logprob))
                top = {self.text_of(other): finite(value) for other, value in entry.top}
                told.top_logprobs.append(top | {text: finite(entry.logprob)})
        return told


def finite(logprob: float) -> float:
    """JSON has no minus infinity; OpenAI says -9999.0 for what cannot be."""
    return max(logprob, -9999.0)


def _byte_alphabet() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
