"""`mswift data show`: what is between the marks is what the mask says."""

import json
import re

import pytest

from mswift.cli.main import main
from tests.support.shared import shared_file


@pytest.fixture
def show(capsys, tmp_path):
    def call(rows, *flags):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = str(shared_file("data/tokenizers/qwen2-8k"))
        status = main(["data", "show", "--model", model, "--dataset", str(path), *flags])
        out, err = capsys.readouterr()
        return status, out, err

    return call


ROWS = [{"query": f"q{n}", "response": f"a{n}", "id": n} for n in range(5)]


def test_learned_tokens_are_marked(show):
    status, out, _ = show([ROWS[0], {"query": "q"}, *ROWS[1:]], "--num_rows", "3")
    assert status == 0
    assert re.findall("⟦(.*?)⟧", out) == ["a0<|im_end|>", "a1<|im_end|>"]
    assert "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n⟦a0" in out
    assert re.search(r"row 1: \d+ tokens, \d+ of them learned", out)
    assert "row 2: rejected: " in out
    assert "has no assistant turn" in out
    assert "fields not used: id" in out
    assert "q3" not in out
    colored = show(ROWS, "--color", "always")[1]
    assert "\x1b[32ma0<|im_end|>\x1b[0m" in colored
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss_scale": 0.25}]}]
    assert re.findall("⟦(.*?)⟧", show(rows)[1]) == ["0.25× a<|im_end|>"]
    assert "\x1b[33m0.25× a<|im_end|>\x1b[0m" in show(rows, "--color", "always")[1]


def test_options(show):
    assert re.findall("⟦(.*?)⟧", show(ROWS, "--kind", "pt", "--columns", '{"response": "text"}')[1])[0].endswith(
        "<|im_end|>"
    )
    assert "left out (longer than --max_length 4)" in show(ROWS, "--max_length", "4")[1]
    assert show([{"query": "q"}], "--strict")[0] == 1
    status, _, err = show(ROWS, "--num_rows", "0")
    assert (status, "--num_rows 0: at least 1; --num_rows 3" in err) == (2, True)
