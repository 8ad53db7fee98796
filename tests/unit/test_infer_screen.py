"""What an answer looks like in a pipe and at a terminal."""

import os
import pty
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mswift.infer.screen import block_end

ANSWER = (
    "# Head\n\nA **bold** word and\x1b]0;title\x07 [a link](https://a.example).\n\n"
    "```\ncode **as it is**\n\nmore\n```\n\nend"
)
SHOW = """
import sys
from mswift.infer.screen import screen_of
screen = screen_of(markdown=sys.argv[1] == "true")
for at in range(0, len(sys.argv[2]), 3):
    screen.add(sys.argv[2][at : at + 3])
screen.end()
"""


def _at_terminal(markdown: str, term: str) -> str:
    """All that a terminal gets."""
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-c", SHOW, markdown, ANSWER]
    process = subprocess.Popen(argv, stdout=theirs, stdin=subprocess.DEVNULL, env={**os.environ, "TERM": term})
    os.close(theirs)
    seen = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux's end of a pseudo terminal
            break
        if not data:
            break
        seen += data
    os.close(ours)
    assert process.wait(60) == 0
    return seen.decode().replace("\r\n", "\n")


def test_a_pipe_gets_the_text_as_it_is() -> None:
    done = subprocess.run([sys.executable, "-c", SHOW, "true", ANSWER], capture_output=True, check=True, timeout=60)
    assert done.stdout.decode() == ANSWER + "\n"


@pytest.mark.parametrize(("markdown", "term"), [("false", "xterm-256color"), ("true", "dumb")])
def test_a_terminal_gets_no_control_characters(markdown: str, term: str) -> None:
    assert _at_terminal(markdown, term) == ANSWER.replace("\x1b", "\ufffd").replace("\x07", "\ufffd") + "\n"


@pytest.mark.skipif(find_spec("rich") is None, reason="rich is not installed")
def test_markdown_is_formatted_where_rich_is() -> None:
    seen = _at_terminal("true", "xterm-256color")
    assert "\x1b]" not in seen  # neither a title nor a link whose address is hidden
    kept = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen[seen.rindex("\x1b[2K") :])
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert "A bold word and\ufffd]0;title\ufffd a link (https://a.example)." in text
    assert "code **as it is**" in text
    assert kept.strip() == "end"


def test_rich_is_no_dependency() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"rich' not in text


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("", None), ("a\n", None), ("a\n\n", 3), ("\n\na\n\nb", 5), ("a\n\nb\n\n", 3), ("```\na\n\nb\n", None),
        ("```\na\n\nb\n```\n\n", 14), ("~~~\n```\n\n~~~\n\n", 14), ("````\n```\n\n````\n\n", 16), ("a\u2028\n\n", 4),
    ],
)  # fmt: skip
def test_blocks_end_at_blank_lines_outside_code(text: str, end: int | None) -> None:
    assert block_end(text) == end
