"""Rows -> conversations and documents: every accepted shape, and an error in words for everything else."""

import json

import pytest

from mswift.data.rows import to_conversation, to_document
from mswift.errors import DataError

WHERE = "train.jsonl, row 7"
U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
S = {"role": "system", "content": "be kind"}
CALL = '{"name": "add", "arguments": {"a": 1}}'


def messages(row, system=None):
    return to_conversation(row, WHERE, system).messages


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [U, A]},
        {"messages": [{**U, "name": None}, A]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]},
        {"conversation": [{"human": "hi", "assistant": "hello"}]},
        {"instruction": "hi", "input": "", "output": "hello"},
        {"instruction": "hi", "output": "hello", "history": []},
        {"query": "hi", "response": "hello", "system": ""},
        {"prompt": "hi", "completion": "hello"},
        {"question": "hi", "answer": "hello"},
        {"input": "hi", "output": "hello"},
        {"problem": "hi", "solution": "hello"},
    ],
)
def test_shapes(row):
    assert messages(row) == [U, A]
    assert messages(row, system="be kind") == [S, U, A]


def test_the_instruction_and_its_input_are_two_lines_of_one_question():
    row = {"instruction": "Sort:", "input": "3 1 2", "output": "1 2 3", "text": "Below is an instruction ..."}
    conversation = to_conversation(row, WHERE)
    assert [m["content"] for m in conversation.messages] == ["Sort:\n3 1 2", "1 2 3"]
    assert conversation.ignored == {"text"}


def test_history_and_system_come_first():
    row = {"system": "be kind", "query": "c", "response": "d", "history": [["a", "b"]], "id": 4}
    conversation = to_conversation(row, WHERE, default_system="not this one")
    assert [m["content"] for m in conversation.messages] == ["be kind", "a", "b", "c", "d"]
    assert conversation.ignored == {"id"}


def test_function_calls_become_tool_calls():
    row = {
        "conversations": [
            {"from": "human", "value": "1+1?"}, {"from": "function_call", "value": CALL},
            {"from": "observation", "value": "2"}, {"from": "gpt", "value": "Two."},
        ],
        "tools": json.dumps([{"name": "add", "parameters": {}}]),
    }  # fmt: skip
    conversation = to_conversation(row, WHERE)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1]["tool_calls"] == [{"type": "function", "function": json.loads(CALL)}]
    assert conversation.tools == [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def test_a_row_without_an_assistant_turn_names_the_remedies():
    for row in ({"messages": [U]}, {"query": "hi"}, {"query": "hi", "response": ""}, {"instruction": "hi"}):
        with pytest.raises(DataError, match=r"row 7 has no assistant turn.*add one, remove the row, or .*`mswift pt`"):
            messages(row)
    assert messages({"messages": [U, A]}) == [U, A]
    assert to_document({"text": "hi"}, WHERE) == "hi"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"foo": 1, "bar": 2}, "unknown shape. Fields found: `bar`, `foo`. Accepted: messages"),
        ({"text": "x"}, "Fields found: `text`.*Plain text is trained on with `mswift pt`"),
        ({}, "Fields found: no field"),
        ({"question": "a", "prompt": "b", "answer": "c"}, "`prompt`, `question`, and only one can be used"),
        ({"question": "a", "answer": "c", "solution": "d"}, "`answer`, `solution`, and only one can be used"),
        ({"instruction": "a", "output": "c", "response": "d"}, "`output`, `response`, and only one can be used"),
        ({"query": "a", "response": "b", "images": ["x.png"]}, "`images` cannot be trained on yet; remove the field"),
        ({"query": "a", "response": 4}, "a response must be a string, it is a int"),
        ({"query": "a", "response": "b", "history": ["x"]}, "`history` must be a list of .query, response. pairs"),
        ({"messages": "hi"}, "messages must be a list, this is a str"),
        ({"messages": ["hi"]}, "message 1: must be an object with role and content"),
        ({"messages": [U, {**A, "loss": False}]}, "message 2: field `loss` would change what is learned"),
        ({"messages": [U, {"role": "assistant"}]}, "message 2: needs role and content .*has `role`"),
        ({"messages": [{**U, "role": "robot"}, A]}, "message 1: unknown role 'robot'; accepted: system, user, human"),
        ({"messages": [{**U, "content": [{"type": "text"}]}, A]}, "`content` must be a string, it is a list"),
        ({"messages": [U, {**A, "content": " \n"}]}, "message 2: the assistant turn is empty; write its answer or"),
        ({"messages": [S, U, A], "system": "x"}, "a `system` field and a system message; keep one"),
        ({"messages": [U, A], "tools": "not json"}, "`tools` is not JSON"),
        ({"messages": [U, A], "tools": {"name": "add"}}, "`tools` must be a list of function descriptions"),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "message 1: a function call is not JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, 'must be JSON {"name": ..., "arguments"'),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_the_row(row, message):
    with pytest.raises(DataError, match=message) as caught:
        messages(row)
    assert str(caught.value).startswith(WHERE)


def test_documents():
    assert to_document({"text": "a", "id": 3}, WHERE) == "a"
    assert to_document({"response": "a"}, WHERE) == "a"
    for row in ({"query": "a", "response": "b"}, {"body": "a"}):
        with pytest.raises(DataError, match=r"row 7: pt takes rows with a `text` field .*`mswift sft`"):
            to_document(row, WHERE)
    with pytest.raises(DataError, match="`text` must be a string, it is a list"):
        to_document({"text": ["a"]}, WHERE)
