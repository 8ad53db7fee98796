"""Every row of ../shared/data/{sft,pref,agent} is read as it is, and says what the file says."""

import json
import re
from collections import Counter

import pytest

from mswift.data.formats import required_row
from mswift.data.rows import read_row, to_document
from mswift.data.sources import parse_source
from mswift.data.toolbench import standard_name
from tests.support.shared import shared_file

CONVERSATIONS = {
    "sft/alpaca_en_demo.json": 999, "sft/alpaca_zh_demo.json": 300, "sft/identity.json": 91, "sft/mllm_demo.json": 6,
    "sft/glaive_toolcall_en_demo.json": 300, "sft/kto_en_demo.json": 300, "sft/v1_sft_demo.jsonl": 100,
    "sft/v1_dpo_demo.jsonl": 10, "sft/dpo_en_demo.json": 300, "sft/dpo_zh_demo.json": 60,
    "sft/reason_tool_use_demo_50.jsonl": 50, "pref/hh_harmless_200.jsonl": 200, "agent/toolbench/answer": 3,
    "agent/toolbench/instruction": 10, "agent/bfcl/simple_python_100.jsonl": 100,
    "agent/bfcl/simple_python_100.answers.jsonl": 100,
}  # fmt: skip
DOCUMENTS = ("c4_demo.jsonl", "formats/swift_pre.csv", "formats/swift_pre.jsonl")


def _raw(name):
    return [required_row(r) for part in parse_source(str(shared_file(f"data/{name}"))).parts for r in part.records()]


def _rows(name):
    return [read_row(row, f"row {number}") for number, row in enumerate(_raw(name), start=1)]


def _lost(value, kept):
    """Texts in a row, but for the names of its fields, that are not in `kept`; a JSON text may be there parsed."""
    if isinstance(value, str):
        if json.dumps(value.strip(), ensure_ascii=False)[1:-1] in kept:
            return []
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in _lost(item, kept)]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_row_is_read(name):
    assert len(_rows(name)) == CONVERSATIONS[name]


def test_no_file_is_forgotten():
    known = [shared_file(f"data/{name}") for name in CONVERSATIONS] + [shared_file(f"data/sft/{n}") for n in DOCUMENTS]
    formats = [path for path in shared_file("data/sft/formats").iterdir() if f"formats/{path.name}" not in DOCUMENTS]
    assert len(formats) == 13
    for path in formats:
        assert len(_rows(f"sft/formats/{path.name}")) == 3
    found = [p for kind in ("sft", "pref", "agent") for p in shared_file(f"data/{kind}").rglob("*.*")
             if p.suffix in (".json", ".jsonl", ".csv") and p.parent.name != "loss_scale"]  # fmt: skip
    assert [p for p in found if not any(p == k or k in p.parents for k in [*known, *formats])] == []


@pytest.mark.parametrize("name", [n for n in CONVERSATIONS if n.startswith("sft") and "mllm" not in n])
def test_every_text_of_the_file_is_in_the_conversation(name):
    """Roles, types and joined lines aside, nothing that is written in a row is lost."""
    markup = {"human", "gpt", "user", "assistant", "system", "tool", "function_call", "observation", "text",
              "reasoning", "tool_call", "function"}  # fmt: skip
    for raw, row in zip(_raw(name), _rows(name), strict=True):
        kept = json.dumps([row.messages, row.tools, row.rejected_messages, row.label], ensure_ascii=False)
        lost = [text for text in _lost(raw, kept) if text not in markup]
        assert lost == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents(name):
    assert all(to_document(row, "row") for row in _raw(f"sft/{name}"))


def test_weights_of_messages_are_kept():
    for row in _rows("sft/v1_sft_demo.jsonl"):
        assert [message.get("loss") for message in row.messages] == [False, True]


def test_transcripts_are_kept_to_the_letter():
    for raw, row in zip(_raw("pref/hh_harmless_200.jsonl"), _rows("pref/hh_harmless_200.jsonl"), strict=True):
        for text, messages in ((raw["chosen"], row.messages), (raw["rejected"], row.rejected_messages)):
            spoken = "".join(f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in messages)
            assert re.sub(r"\s+", " ", spoken).strip() == re.sub(r"\s+", " ", text).strip()


def test_an_answer_tree_is_the_path_to_its_finished_leaf():
    """The oracle is the tree itself: thoughts, actions, inputs and observations from the root to what was finished."""
    for raw, row in zip(_raw("agent/toolbench/answer"), _rows("agent/toolbench/answer"), strict=True):
        calls = [call["function"] for m in row.messages for call in m.get("tool_calls", ())]
        path = _finished(raw["tree"]["tree"])
        assert [call["name"] for call in calls] == [n["description"] for n in path if n["node_type"] == "Action"]
        inputs = [n for n in path if n["node_type"] == "Action Input" and n["depth"]]
        assert [call["arguments"] for call in calls] == [json.loads(n["description"]) for n in inputs]
        thoughts = [n["description"] for n in path if n["node_type"] == "Thought"]
        assert [m["content"] for m in row.messages if m["role"] == "assistant" and m["content"]] == thoughts
        observed = [m["content"] for m in row.messages if m["role"] == "tool"]
        assert observed == [n["observation"] for n in inputs[:-1]]
        assert [tool["function"] for tool in row.tools] == raw["answer_generation"]["function"]
        assert not any("not the first time" in m["content"] for m in row.messages)


def _finished(node):
    if not node["children"]:
        return [node] if node["finished"] else None
    return next(([node, *path] for child in node["children"] if (path := _finished(child))), None)


def test_queries_name_the_tools_that_they_need():
    for row in _rows("agent/toolbench/instruction"):
        names = Counter(tool["function"]["name"] for tool in row.tools)
        assert [m["role"] for m in row.messages] == ["user"]
        kinds = {p["type"] for tool in row.tools for p in tool["function"]["parameters"]["properties"].values()}
        assert kinds <= {"string", "integer", "boolean"}
        for tool, api in row.extra["relevant APIs"]:
            assert names[f"{standard_name(api)}_for_{standard_name(tool)}"[-64:]] == 1
