"""Calls that the agent templates write are read by vLLM's own parsers of these forms as they are read here."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mswift.agent.calls import Call, Reply
from mswift.agent.format import split_thinking
from mswift.agent.formats import FORMATS
from mswift.data.rows import to_conversation
from tests.support.shared import shared_file
from tests.unit.test_agent import READ, TRAINED, shared_rows

PARSERS = {"hermes": "hermes", "llama3": "llama3_json", "deepseek_v3_1": "deepseek_v31", "mistral": "mistral"}
"""Those that vLLM has; its parser of GLM 4.5 and later reads another form than GLM 4's."""
PYTHON = os.environ.get("MSWIFT_VLLM_PYTHON") or (sys.executable if find_spec("vllm") else None)
OWN = [
    Reply("", (Call("f", {}),)),
    Reply("", (Call("f", {"a": [1, 2.5, None, True, {"b": "}"}], "中": '"\\\n'}),)),
    Reply("Both.", (Call("f", {"a": 1}), Call("g.h", {"b": "</x>"}))),
]


def replies() -> list[Reply]:
    """Turns with calls of the shared rows, and some with all kinds of values."""
    found = list(OWN)
    for file in TRAINED:
        for row in shared_rows(file):
            for message in to_conversation(row, "row").messages:
                if calls := [call["function"] for call in message.get("tool_calls", ())]:
                    found.append(Reply(message["content"], tuple(Call(c["name"], c["arguments"]) for c in calls)))
    return found


def by_vllm(texts: list[tuple[str, str]]) -> list[Any]:
    """(parser, text) -> [content, [[name, arguments], ...]]."""
    assert PYTHON is not None
    program = Path(__file__).parents[1] / "support" / "vllm_parsers.py"
    asked = {"tokenizer": str(shared_file("data/tokenizers/qwen2-8k")), "texts": texts}
    argv = [PYTHON, "-P", str(program)]  # -P: beside the program lies a module that is named vllm too
    done = subprocess.run(argv, input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(PYTHON is None, reason="no vLLM here: make vllm, or name an interpreter in MSWIFT_VLLM_PYTHON")
def test_vllm_reads_the_calls_that_are_written() -> None:
    """Thinking is taken off first, as vLLM does it with another parser."""
    expected = [(name, reply, FORMATS[name].write(reply, "row")) for name in PARSERS for reply in replies()]
    expected += [(name, FORMATS[name].read(text), text) for name in PARSERS for text in READ.get(name, ())]
    assert len(expected) > 1000
    found = by_vllm([(PARSERS[name], split_thinking(text)[1]) for name, _, text in expected])
    for (name, reply, text), (content, calls) in zip(expected, found, strict=True):
        assert FORMATS[name].read(text) == reply
        assert calls == [[call.name, call.arguments] for call in reply.calls], text
        words = split_thinking(reply.content)[1].strip()
        assert content.strip() == ("" if name == "llama3" else words), text  # vLLM leaves out what stands before a call
