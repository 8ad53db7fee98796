"""Rows -> conversations and documents: every accepted shape, and an error in words for everything else."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mswift.data.messages import read_messages
from mswift.data.rows import read_row, to_conversation, to_document
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


SEARCH = {"name": "search", "arguments": {"q": "x"}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": SEARCH}]}
RESULT = {"role": "tool", "content": "found"}
TWICE = {**CALLED, "tool_calls": CALLED["tool_calls"] * 2}
SAYS = {"role": "assistant", "content": "Let me see.", "tool_calls": CALLED["tool_calls"]}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhello"}
TEXT = json.dumps(SEARCH)


def _call(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([_call("tool_call", TEXT), _call("tool_response", "found")], [CALLED, RESULT]),
        ([{"from": "function_call", "value": TEXT}, {"from": "observation", "value": "found"}], [CALLED, RESULT]),
        ([_call("tool_call", TEXT), _call("tool_call", TEXT), _call("tool", "found")], [TWICE, RESULT]),
        ([_call("tool_call", f"[{TEXT}, {TEXT}]")], [TWICE]),
        ([_call("assistant", "Let me see."), _call("tool_call", TEXT)], [SAYS]),
        ([{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": SEARCH}]}], [CALLED]),
        (
            [{"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function":
              {"name": "search", "arguments": '{"q": "x"}'}}]},
             {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "found"}]}],
            [{**CALLED, "tool_calls": [{"id": "c1", **CALLED["tool_calls"][0]}]}, {**RESULT, "tool_call_id": "c1"}],
        ),
        ([{"role": "assistant", "function_call": SEARCH}, {"role": "function", "name": "search", "content": "found"}],
         [CALLED, {**RESULT, "name": "search"}]),
        (
            [_call("assistant", [{"type": "text", "text": "Let me see."},
                                 {"type": "tool_use", "id": "t1", "name": "search", "input": {"q": "x"}}]),
             _call("user", [{"type": "tool_result", "tool_use_id": "t1", "content": "found"},
                            {"type": "text", "text": "more"}])],
            [{**SAYS, "tool_calls": [{"id": "t1", **CALLED["tool_calls"][0]}]}, {**RESULT, "tool_call_id": "t1"},
             _call("user", "more")],
        ),
        ([_call("assistant", [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "hello"}])], [THOUGHT]),
        ([_call("assistant", [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "hello"}])], [THOUGHT]),
        ([{**A, "reasoning_content": "hm"}], [THOUGHT]),
        ([_call("assistant", [{"type": "tool_call", "value": TEXT}])], [CALLED]),
        ([{**A, "loss_weight": 1.0}, {**A, "weight": 0}], [{**A, "loss": True}, {**A, "loss": False}]),
        ([{**A, "loss": True, "loss_scale": 0.25}], [{**A, "loss": True, "loss_scale": 0.25}]),
        ([{**A, "id": 7, "timestamp": "now", "refusal": None}], [A]),
    ],
)  # fmt: skip
def test_messages_of_every_kind(given, expected):
    assert read_row({"messages": [U, *given]}, WHERE).messages == [U, *expected]
    assert read_row({"messages": json.dumps([U, *given])}, WHERE).messages == [U, *expected]


def test_transcripts_become_messages():
    chatml = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in (S, U, A))
    for name in ("text", "messages", "conversation"):
        assert read_row({name: chatml}, WHERE).messages == [S, U, A]
    spoken = read_row(
        {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: no"}, WHERE
    )
    assert (spoken.messages, spoken.rejected_messages) == ([U, A], [U, NO])
    assert to_document({"text": chatml}, WHERE) == chatml


def test_prompts_and_histories_may_be_messages():
    for row in (
        {"prompt": [U], "completion": [A]},
        {"query": "hi", "response": "hello"},
        {"question": [[U]], "answer": "hello"},
        {"prompt": "<|im_start|>user\nhi<|im_end|>", "response": "hello"},
    ):
        assert messages(row) == [U, A]
    history = {"query": "hi", "response": "hello", "history": '[["a", "b"]]'}
    assert [m["content"] for m in messages(history)] == ["a", "b", "hi", "hello"]
    assert messages(history | {"history": [U, A]}) == [U, A, U, A]


NO = {"role": "assistant", "content": "no"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "hello", "rejected": "no"},
        {"prompt": [U], "chosen": [A], "rejected": [NO]},
        {"prompt": "hi", "chosen": [U, A], "rejected": [U, NO]},
        {"chosen": [U, A], "rejected": [U, NO]},
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "hello"},
         "rejected": {"from": "gpt", "value": "no"}},
        {"chosen_messages": [U, A], "rejected_messages": [U, NO]},
        {"query": "hi", "response": "hello", "rejected_response": "no"},
        {"query": "hi", "response": "hello", "rejected_response": ["no"]},
        {"messages": [U, A], "rejected_response": "no"},
        {"messages": [U, A], "rejected_messages": [U, NO]},
        {"instruction": "hi", "chosen": "hello", "rejected": "no", "input": ""},
        {"question": "hi", "response_chosen": "hello", "response_rejected": "no"},
    ],
)  # fmt: skip
def test_preference_rows(row):
    found = read_row(row | {"margin": "0.5", "system": "be kind", "source": "x"}, WHERE)
    assert (found.messages, found.rejected_messages) == ([S, U, A], [S, U, NO])
    assert (found.margin, found.extra) == (0.5, {"source": "x"})
    assert {name for name in row if "rejected" in name} <= found.ignored
    assert messages(row) == [U, A]


@pytest.mark.parametrize(("label", "expected"), [(True, True), (0, False), ("false", False), (1.0, True)])
def test_kto_labels(label, expected):
    found = read_row({"prompt": "hi", "completion": "hello", "label": label}, WHERE)
    assert (found.messages, found.label, found.extra) == ([U, A], expected, {})
    found = read_row({"query": "hi", "response": "hello", "label": "joy"}, WHERE)
    assert (found.label, found.extra) == (None, {"label": "joy"})


def test_a_prompt_alone_keeps_its_columns_for_rewards():
    found = read_row({"messages": [U], "solution": "4", "level": 2}, WHERE)
    assert (found.messages, found.extra) == ([U], {"solution": "4", "level": 2})
    found = read_row({"query": "hi", "ground_truth": [4]}, WHERE)
    assert (found.messages, found.extra) == ([U], {"ground_truth": [4]})
    assert read_row({"id": "x", "ground_truth": [4]}, WHERE).messages == []


@pytest.mark.parametrize(
    "tools",
    [
        [{"name": "add", "parameters": {}}],
        '[{"name": "add", "parameters": {}}]',
        ['{"name": "add", "parameters": {}}'],
        [{"name": "add", "input_schema": {}}],
        [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    ],
)
@pytest.mark.parametrize("name", ["tools", "functions", "function"])
def test_tools_in_every_form(name, tools):
    found = read_row({"messages": [U, A], name: tools}, WHERE)
    assert found.tools == [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert found.ignored == frozenset()


@pytest.mark.parametrize(
    ("row", "text", "media"),
    [
        ({"query": "<image>hi", "images": ["a.png"]}, "<image>hi", {"images": ["a.png"]}),
        ({"query": "hi", "images": ["a.png", "b.png"]}, "<image><image>hi", {"images": ["a.png", "b.png"]}),
        ({"query": "hi", "image": "a.png"}, "<image>hi", {"images": ["a.png"]}),
        ({"query": "<img>a.png</img>hi"}, "<image>hi", {"images": ["a.png"]}),
        ({"query": "<video>hi", "videos": "a.mp4"}, "<video>hi", {"videos": ["a.mp4"]}),
        ({"query": "<audio>hi", "audios": ["a.wav"]}, "<audio>hi", {"audios": ["a.wav"]}),
        (
            {"messages": [_call("user", [{"type": "image_url", "image_url": {"url": "http://a"}}, "hi"])]},
            "<image>hi", {"images": ["http://a"]},
        ),
        ({"messages": [_call("user", [{"type": "image", "image": "a"}, "hi"])]}, "<image>hi", {"images": ["a"]}),
        (
            {"messages": [_call("user", [{"type": "image"}, {"type": "text", "text": "hi"}])], "images": ["a.png"]},
            "<image>hi", {"images": ["a.png"]},
        ),
    ],
)  # fmt: skip
def test_media(row, text, media):
    found = read_row(row, WHERE)
    assert (found.messages[0]["content"], found.media) == (text, media)


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
        ({"messages": []}, "Fields found: no field but empty ones, `messages`. Accepted: messages"),
        ({"id": 7, "query": None}, "Fields found: `id`, and empty ones, `query`. Accepted: messages"),
        ({"question": "a", "prompt": "b", "answer": "c"}, "`prompt`, `question`, and only one can be used"),
        ({"question": "a", "answer": "c", "solution": "d"}, "`answer`, `solution`, and only one can be used"),
        ({"instruction": "a", "output": "c", "response": "d"}, "`output`, `response`, and only one can be used"),
        ({"query": "a", "response": "b", "images": ["x.png"]}, "`images` cannot be trained on yet; remove the field"),
        ({"query": "a", "response": 4}, "`response` must be a string, it is a int"),
        ({"query": "a", "response": "b", "images": ["x.png"] * 2, "system": "<image>"}, "1 marks <image> for 2 images"),
        ({"query": "a", "response": "b", "history": ["x"]}, "`history` must be a list of .query, response. pairs"),
        ({"messages": "hi"}, "messages must be a list, this is a str"),
        ({"messages": ["hi"]}, "message 1: must be an object with role and content"),
        ({"messages": [U, {**A, "mask": 1}]}, "message 2: field `mask` is not known, and might change what is learned"),
        ({"messages": [U, {**A, "loss": False}]}, "`loss` is off on every assistant turn"),
        ({"messages": [U, {**A, "loss": 0.5}]}, "message 2: `loss` must be true or false.*called `loss_scale`"),
        ({"messages": [U, {**A, "loss_scale": -1}]}, "message 2: `loss_scale` must be .* a number from 0, it is -1"),
        ({"messages": [U, {**A, "loss_scale": 1e-7}]}, "a number from 0, it is 1e-07; 0, or from 1e-06 to 1e.06"),
        ({"messages": [{**U, "loss": True}, A]}, "message 1: `loss` on a user message; only assistant turns"),
        ({"messages": [U, {"role": "assistant"}]}, "message 2: needs role and content .*has `role`"),
        ({"messages": [{**U, "role": "robot"}, A]}, "message 1: unknown role 'robot'; accepted: system, user, human"),
        (
            {"messages": [{**U, "content": 3}, A]},
            "message 1: `content` must be a string or a list of blocks, it is a int",
        ),
        (
            {"messages": [{**U, "content": [{"type": "text"}]}, A]},
            "message 1, block 1: the text of a block must be a st",
        ),
        ({"messages": [{**U, "content": [{"type": "poem", "x": 1}]}, A]}, "a block of type 'poem' with `type`, `x` is"),
        ({"messages": [{**U, "content": [{"type": "thinking", "thinking": "x"}]}, A]}, "only an assistant's can"),
        ({"messages": "<|im_start|>user\nhi"}, "the ChatML text is not a row of"),
        ({"prompt": "a", "chosen": "b"}, "has `chosen` but no `rejected`"),
        ({"chosen": "b", "rejected": "c"}, "`chosen`: there is no prompt to this answer; add a `prompt`"),
        ({"prompt": "a", "rejected_response": "b"}, "has `rejected_response` but no answer to prefer to it"),
        ({"query": "a", "response": "b", "chosen": "c", "rejected": "d"}, "has `chosen` and an answer besides"),
        ({"prompt": "a", "chosen": "b", "rejected": ["c", "d"]}, "`rejected`: 2 answers; a preference row has one"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "`margin` must be a number, it is 'x'"),
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


_NAMES = [
    "messages",
    "conversations",
    "role",
    "content",
    "from",
    "value",
    "human",
    "assistant",
    "type",
    "text",
    "query",
    "response",
    "history",
    "system",
    "instruction",
    "input",
    "output",
    "chosen",
    "rejected",
    "rejected_response",
    "rejected_messages",
    "label",
    "margin",
    "tools",
    "function",
    "tool_calls",
    "name",
    "image",
    "function_call",
    "arguments",
    "images",
    "loss",
    "loss_scale",
    "api_list",
    "api_name",
    "tool_name",
    "required_parameters",
    "tree",
    "prompt",
    "thinking",
    "answer_generation",
    "train_messages",
    "tool_use_id",
    "completion",
]
_WORDS = ["user", "assistant", "tool_call", "tool", "text", "image", "tool_use", "tool_result", "thinking", "hi", "",
          "[", '{"name": "f", "arguments": {}}', "[[1]]", "<|im_start|>user", "\n\nHuman: a", "<image>"]  # fmt: skip
_ANY = st.recursive(
    st.none() | st.booleans() | st.sampled_from([0, 1, -1, 0.5, 10**400, float("inf")]) | st.sampled_from(_WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from(_NAMES), _ANY, max_size=5))
def test_any_row_is_read_or_refused_in_words(row):
    """No row of any shape ends a run with a traceback."""
    for read in (to_conversation, to_document):
        refusal = WHERE
        try:
            read(row, WHERE)
        except DataError as error:
            refusal = str(error)
        assert refusal.startswith(WHERE)


def test_documents():
    assert to_document({"text": "a", "id": 3}, WHERE) == "a"
    assert to_document({"response": "a"}, WHERE) == "a"
    for row in ({"query": "a", "response": "b"}, {"body": "a"}):
        with pytest.raises(DataError, match=r"row 7: pt takes rows with a `text` field .*`mswift sft`"):
            to_document(row, WHERE)
    with pytest.raises(DataError, match="`text` must be a string, it is a list"):
        to_document({"text": ["a"]}, WHERE)


def test_calls_of_another_weight_than_the_turn_before_are_a_turn_of_their_own():
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}
    said = {"role": "assistant", "content": "a"}
    for before, after, turns in ((None, None, 1), (2.0, 2.0, 1), (2.0, None, 2), (None, 0.5, 2), (1.0, 2.0, 2)):
        messages = [said | ({"loss_scale": before} if before else {}), call | ({"loss_scale": after} if after else {})]
        assert len(read_messages(messages, "row", {})) == turns
