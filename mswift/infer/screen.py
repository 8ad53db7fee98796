"""Answers on the standard output while they grow: as they are in a pipe, without control characters at a terminal,
and there as formatted markdown where the package rich is installed. Torch-free.
"""

import os
import re
import sys
from importlib.util import find_spec
from typing import Any, Protocol

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LINE = re.compile(r"[^\n]*\n")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


class Screen(Protocol):
    """Takes an answer."""

    def add(self, text: str) -> None:
        """More of it."""

    def end(self) -> None:
        """That was all."""


def screen_of(*, markdown: bool) -> Screen:
    """For the standard output as it is now; markdown: formatted where that is possible."""
    if not sys.stdout.isatty():
        return Plain()
    if markdown and os.environ.get("TERM", "dumb") != "dumb" and find_spec("rich") is not None:
        return Formatted()
    return Visible()


def visible(text: str) -> str:
    """Without the characters that would move a terminal's cursor or change its state."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


class Plain:
    """Text as it comes."""

    def add(self, text: str) -> None:
        """More of it."""
        print(text, end="", flush=True)

    def end(self) -> None:
        """End its line."""
        print(flush=True)


class Visible(Plain):
    """The same without control characters."""

    def add(self, text: str) -> None:
        """More of it."""
        super().add(visible(text))


class Formatted:
    """Markdown, block by block: the one that grows is drawn again and again, and stays once it is complete."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console()
        self._block = ""
        self._live: Any = None

    def add(self, text: str) -> None:
        """More of it."""
        from rich.live import Live

        self._block += visible(text)
        while (end := block_end(self._block)) is not None:
            block, self._block = self._block[:end], self._block[end:]
            self._stay(block)
        if self._block.strip():
            if self._live is None:
                self._live = Live(console=self._console, transient=True, refresh_per_second=8)
                self._live.start()
            self._live.update(_markdown(self._block))

    def end(self) -> None:
        """Show what is left."""
        block, self._block = self._block, ""
        self._stay(block)

    def _stay(self, block: str) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if block.strip():
            self._console.print(_markdown(block))


def _markdown(text: str) -> Any:
    from rich.markdown import Markdown

    return Markdown(text, hyperlinks=False)  # addresses are shown, not hidden behind words


def block_end(text: str) -> int | None:
    """Where the first block ends: behind the blank line after it, which is not in fenced code. None: it may go on."""
    fence, start, seen = "", 0, False
    for line in _LINE.findall(text):
        start += len(line)
        mark = _FENCE.match(line)
        if fence:
            closes = mark is not None and mark[1].startswith(fence) and not line.strip().strip(fence[0])
            fence = "" if closes else fence
        elif mark is not None:
            fence, seen = mark[1], True
        elif line.strip():
            seen = True
        elif seen:
            return start
    return None
