"""Agent templates: what is written is read back, published texts are met, and nothing malformed becomes a call."""

import contextlib
import hashlib
import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mswift.agent.calls import Call, Reply
from mswift.agent.conversation import as_text, opening, read_reply, write_reply
from mswift.agent.format import AgentFormat
from mswift.agent.formats import FORMATS
from mswift.config.agents import AgentTemplate
from mswift.data.formats import required_row
from mswift.data.rows import read_row, to_conversation
from mswift.data.selection import Selection, selected_parts
from mswift.data.sources import parse_source
from mswift.errors import DataError
from tests.support.shared import shared_file

NAMES = list(FORMATS)
KINDS = ["react_en", "qwen_zh", "hermes", "llama3", "glm4", "deepseek_v3_1", "mistral"]
"""One of each: others differ in their prompts."""
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA = json.dumps(TOOL["function"]["parameters"])


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How warm is it in Bern?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [call("get_weather", city="Bern")]},
    {"role": "tool", "content": "17 °C"},
    {"role": "assistant", "content": "17 °C."},
]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
MARKS = st.sampled_from(
    ["\n", " ", '"', "}", "</tool_call>", "Action Input:", "Observation:", "✿RESULT✿", "[TOOL_CALLS]", "<｜tool▁sep｜>",
     "Action:", "<think>", "</think>", '{"name": "f"', "<|assistant|>", "f\n{", ";", ": ", "<|python_tag|>"]
)  # fmt: skip
texts = st.lists(MARKS | st.text(max_size=5), max_size=4).map("".join)
calls = st.builds(
    Call, st.from_regex(r"[a-z][\w.-]{0,6}", fullmatch=True), st.dictionaries(texts, json_values | texts, max_size=3)
)
replies = st.builds(Reply, texts, st.lists(calls, max_size=3).map(tuple))


def test_the_flag_names_them() -> None:
    assert get_args(AgentTemplate) == tuple(NAMES)


@settings(max_examples=100, deadline=None)
@given(reply=replies)
def test_what_is_written_is_read_back(reply: Reply) -> None:
    for agent in (FORMATS[name] for name in KINDS):
        written = write_or_refuse(agent, reply)
        if written is None:
            continue
        assert agent.read(written) == reply
        if agent.inline and (reply.content or reply.calls):
            assert read_reply(agent.lead(reply.content) + written, agent, behind_results=True) == reply
        for stop in agent.stop if reply.calls else ():  # a text that ended at the stop text, which is no part of it
            assert agent.read(written.removesuffix(stop)) == reply


def write_or_refuse(agent: AgentFormat, reply: Reply) -> str | None:
    """The text, or None where the words of the reply would be read as a call."""
    thinking = reply.content.lstrip().startswith("<think>")
    if agent.marks.search(reply.content) or (thinking and "</think>" not in reply.content):
        with contextlib.suppress(DataError):
            return agent.write(reply, "row 1")
        return None
    return agent.write(reply, "row 1")


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_is_cut_anywhere_is_no_call(name: str) -> None:
    """Every beginning of a text with two calls is read as the calls that are whole, or as text with the reason."""
    agent = FORMATS[name]
    reply = Reply("Wait.", (Call("f", {"a": {"b": "c"}}), Call("g", {"d": [1]})))
    written = agent.write(reply, "row 1")
    for end in range(len(written)):
        read = agent.read(written[:end])
        assert read.calls == reply.calls[: len(read.calls)]
        if not read.calls:
            assert read.content == written[:end]
        assert read.problem is None or (not read.calls and len(read.problem) > 10)


MALFORMED = {
    "hermes": [
        ('<tool_call>\n{"name": "f"}\n</tool_call>', 'the call of f has no object "arguments"'),
        ('<tool_call>\n{"name": "f", "arguments": "{}"}\n</tool_call>', 'the call of f has no object "arguments"'),
        ("<tool_call>\n{'name': 'f'}\n</tool_call>", "what stands in <tool_call> is not JSON"),
        ('<tool_call>\n{"name": "f", "arguments": {}}', "<tool_call> without </tool_call>"),
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call> then?', "text behind a call"),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1, "a": 2}}\n</tool_call>', "names a field twice"),
        ('<tool_call>\n{"name": "f", "arguments": {"a": NaN}}\n</tool_call>', "NaN is no JSON number"),
        ("a</tool_call>", "</tool_call> without <tool_call>"),
    ],
    "react_en": [
        ("Action: f\nObservation:", "Action: without a name and Action Input: on the line below"),
        ("Action: f\nAction Input: city=Bern\nObservation:", "what f is called with is not JSON"),
        ("Action: f\nAction Input: {}\nI made it up", "text behind a call"),
        ("Action Input: {}", "Action Input: without Action:"),
    ],
    "qwen_en": [
        ("✿FUNCTION✿: f\n✿ARGS✿: [1]\n", "what f is called with is no JSON object"),
        ("✿FUNCTION✿: f\n", "✿FUNCTION✿: without a name and ✿ARGS✿:"),
    ],
    "llama3": [
        ('{"name": "f", "parameters": "{}"}', 'the call of f has no object "parameters"'),
        ('{"name": "f", "parameters": {}} done', "text behind a call"),
    ],
    "glm4": [("f\n{}\nand more", "text behind a call"), ("words<|assistant|>words", "is not followed by a call")],
    "deepseek_v3_1": [
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>", "is not followed by calls"),
        ("<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>", "is not followed by calls and"),
        ("<｜tool▁call▁begin｜>f", "without <｜tool▁calls▁begin｜>"),
    ],
    "mistral": [
        ("[TOOL_CALLS][]", "with an empty list"),
        ('[TOOL_CALLS]{"name": "f"}', "what stands behind [TOOL_CALLS] is no JSON list"),
        ('[TOOL_CALLS][{"name": "f", "arguments": {}, "x": 1}]', 'the call of f has "x" besides'),
    ],
}


@pytest.mark.parametrize(("name", "text", "reason"), [(n, *case) for n, cases in MALFORMED.items() for case in cases])
def test_malformed_calls_stay_text_with_the_reason(name: str, text: str, reason: str) -> None:
    read = FORMATS[name].read("Hm. \n" + text if name != "glm4" else text)
    assert (read.content, read.calls) == ("Hm. \n" + text if name != "glm4" else text, ())
    assert reason in (read.problem or "")


READ = {  # what models write and the formats' own parsers take
    "hermes": ['<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n'],
    "react_en": ['Action: f\nAction Input: {\n  "a": 1\n}\nObservation: ', 'Action:f\nAction Input:{"a": 1}'],
    "qwen_zh": ['✿FUNCTION✿: f\n✿ARGS✿: {"a": 1}\n✿RESULT✿', '\n✿FUNCTION✿: f\n✿ARGS✿:\n{"a": 1}'],
    "llama3": ['<|python_tag|>{"name": "f", "parameters": {"a": 1}}', '{"name": "f", "parameters": {"a": 1}};'],
    "glm4": ['f\n{"a": 1}<|observation|>', 'f\n{"a": 1}\n'],
    "mistral": ['[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "9abcdefgh"}]'],
    "deepseek_v3_1": [
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>\n'
    ],
}


@pytest.mark.parametrize(("name", "text"), [(n, text) for n, cases in READ.items() for text in cases])
def test_other_spellings_of_a_call(name: str, text: str) -> None:
    assert FORMATS[name].read(text) == Reply("", (Call("f", {"a": 1}),))


def test_the_turns_of_react_and_qwen() -> None:
    """To the letter what ms-swift's react and Qwen-Agent's `qwen_fncall_prompt` write; results are not learned."""
    _, question, turn = as_text(TALK, [TOOL], FORMATS["react_en"], "row 1")
    assert question == TALK[1]
    said = 'I look.\nAction: get_weather\nAction Input: {"city": "Bern"}\nObservation:'
    assert turn["parts"] == [(said, 1.0), (" 17 °C\n", 0.0), ("17 °C.", 1.0)]
    assert turn["content"] == said + " 17 °C\n17 °C."
    *_, turn = as_text(TALK, [TOOL], FORMATS["qwen_zh"], "row 1")
    assert turn["content"] == (
        'I look.\n✿FUNCTION✿: get_weather\n✿ARGS✿: {"city": "Bern"}\n✿RESULT✿: 17 °C\n✿RETURN✿: 17 °C.'
    )
    assert [weight for _, weight in turn["parts"]] == [1.0, 0.0, 1.0]
    again = [*TALK[:4], {"role": "assistant", "content": "", "tool_calls": [call("f"), call("g")], "loss": False}]
    *_, turn = as_text([*again, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}], None,
                       FORMATS["qwen_zh"], "row 1")  # fmt: skip
    assert turn["content"].endswith(
        "✿RETURN✿: \n✿FUNCTION✿: f\n✿ARGS✿: {}\n✿FUNCTION✿: g\n✿ARGS✿: {}\n✿RESULT✿: 1\n✿RESULT✿: 2\n✿RETURN✿"
    )
    assert [weight for _, weight in turn["parts"]] == [1.0, 0.0, 0.0, 0.0]


SYSTEMS = {
    "react_en": (
        "Be brief.\n\nAnswer the following questions as best you can. You have access to the following tools:\n\n"
        "get_weather: Call this tool to interact with the get_weather API. What is the get_weather API useful for? "
        f"The weather of a city. Parameters: {SCHEMA} Format the arguments as a JSON object.\n\nUse the following "
        "format:\n\nQuestion: ",
        "should be one of [get_weather]\nAction Input: the input to the action\n",
    ),
    "qwen_zh": (
        "Be brief.\n\n# 工具\n\n## 你拥有如下工具：\n\n### get_weather\n\n"
        f"get_weather: The weather of a city. 输入参数：{SCHEMA} 此工具的输入应为JSON对象。"
        "\n\n## 你可以在回复中插入零次、一次或多次以下命令以调用工具：\n\n✿FUNCTION✿: ",
        "必须是[get_weather]之一。\n✿ARGS✿: 工具输入\n",
    ),
    "deepseek_v3_1": (
        "Be brief.\n\n## Tools\nYou have access to the following tools:\n\n### get_weather\nDescription: The weather "
        f"of a city.\n\nParameters: {SCHEMA}\n\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>"
        "{additional_tool_calls}<｜tool▁calls▁end｜>\n",
        "chain them directly without separators or spaces",
    ),
    "glm4": (
        "Be brief.\n\n# 可用工具\n\n## get_weather\n\n" + json.dumps(TOOL["function"], indent=4),
        "\n在调用上述函数时，请使用 Json 格式表示调用的参数。",
    ),
    "mistral": (f"Be brief.\n\n[AVAILABLE_TOOLS][{json.dumps(TOOL)}][/AVAILABLE_TOOLS]", "]"),
    "toolbench": ("Be brief.\n\nYou are AutoGPT, you can use many tools(functions)", json.dumps([TOOL["function"]])),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_system_messages_as_published(name: str) -> None:
    system = as_text(TALK, [TOOL], FORMATS[name], "row 1")[0]
    start, part = SYSTEMS[name]
    assert system["role"] == "system"
    assert system["content"].startswith(start)
    assert part in system["content"]


def test_the_tools_of_llama3_stand_in_the_question() -> None:
    system, question, answer, result, last = as_text(TALK, [TOOL], FORMATS["llama3"], "row 1")
    assert (system, last) == (TALK[0], TALK[-1])
    assert question["content"].startswith("Given the following functions, please respond with a JSON for a function")
    assert question["content"].endswith(json.dumps(TOOL, indent=4) + "\n\nHow warm is it in Bern?")
    assert answer["content"] == 'I look.\n{"name": "get_weather", "parameters": {"city": "Bern"}}'
    assert result == {"role": "tool", "content": "17 °C", "of_tool": True}


@pytest.mark.parametrize("name", KINDS)
def test_results_stand_in_the_order_of_their_calls(name: str) -> None:
    """Of several calls the quickest may be answered first; a template tells results apart by their order alone."""

    def talk(*results: dict[str, Any]) -> str:
        calls = [{**call("get_weather", city=city), "id": city.lower()} for city in ("Bern", "Oslo")]
        asked = [{"role": "user", "content": "Both?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
        return str(as_text([*asked, *results], [TOOL], FORMATS[name], "row 1"))

    bern, oslo = ({"role": "tool", "content": text, "tool_call_id": text} for text in ("bern", "oslo"))
    assert talk(oslo, bern) == talk(bern, oslo)
    plain = [{"role": "tool", "content": text} for text in ("oslo", "bern")]
    assert talk(*plain) == talk(*({**one, "tool_call_id": "unknown"} for one in plain)) != talk(bern, oslo)


def test_rows_without_tools_are_left_alone() -> None:
    plain = [TALK[1], {"role": "assistant", "content": "Observation: warm", "loss_scale": 0.5}]
    for agent in FORMATS.values():
        assert as_text(plain, None, agent, "row 1") == plain


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_told_apart_is_refused(name: str) -> None:
    agent = FORMATS[name]
    with pytest.raises(DataError, match="row 1, message 2: the result of a tool, and no call before it"):
        as_text([TALK[1], TALK[3], TALK[4]], None, agent, "row 1")
    bad = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}
    with pytest.raises(DataError, match=r"row 1, message 1: the arguments of f are \[1\], .* write \{\.\.\.\}"):
        as_text([bad], None, agent, "row 1")
    written = agent.write(Reply("", (Call("f", {}),)), "row 1")
    with pytest.raises(DataError, match=rf"row 1, message 3: .* begins in --agent_template {name}; take another"):
        as_text([*TALK[:2], {"role": "assistant", "content": written}], [TOOL], agent, "row 1")


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_of_inference_is_the_beginning_of_what_was_trained(name: str) -> None:
    agent = FORMATS[name]
    whole, asked = (as_text(messages, [TOOL], agent, "row 1") for messages in (TALK, TALK[:4]))
    begun = opening(asked)
    assert bool(begun) == agent.inline
    assert asked == whole[: len(asked)]
    said = whole[-1]["content"].removeprefix(begun)
    assert read_reply(said, agent, behind_results=bool(begun)) == Reply("17 °C.")
    asking = Reply("I look.", (Call("get_weather", {"city": "Bern"}),))
    assert agent.read(write_reply(TALK[2], agent, "row 1")) == asking


def shared_rows(name: str) -> list[dict[str, Any]]:
    source = parse_source(str(shared_file(f"data/{name}")))
    return [required_row(record) for _, _, records in selected_parts(source, 0, Selection()) for record in records]


TRAINED = ["sft/glaive_toolcall_en_demo.json", "sft/reason_tool_use_demo_50.jsonl", "agent/toolbench/answer"]


@pytest.mark.parametrize("file", TRAINED)
def test_shared_rows_become_text_and_their_calls_come_back(file: str) -> None:
    rows = shared_rows(file)
    num_calls = 0
    for row in rows:
        plain = to_conversation(row, "row")
        wanted = [c["function"] for m in plain.messages for c in m.get("tool_calls", ())]
        num_calls += len(wanted)
        for agent in FORMATS.values():
            conversation = to_conversation(row, "row", agent=agent)
            assert conversation.tools is None
            assert not any("tool_calls" in message for message in conversation.messages)
            texts = [
                text
                for message in conversation.messages
                if message["role"] == "assistant"
                for text, weight in message.get("parts", [(message["content"], 1.0)])
                if weight
            ]
            read = [read_reply(text, agent, behind_results=bool(i) and agent.inline) for i, text in enumerate(texts)]
            assert [reply.problem for reply in read if reply.problem] == []
            assert [{"name": c.name, "arguments": c.arguments} for reply in read for c in reply.calls] == wanted
    assert num_calls >= len(rows) // 2


@pytest.mark.parametrize("file", ["agent/toolbench/instruction", "agent/bfcl/simple_python_100.jsonl"])
def test_shared_prompts_become_text(file: str) -> None:
    for row in shared_rows(file):
        conversation = read_row(row, "row")
        assert conversation.tools
        for agent in FORMATS.values():
            written = as_text(conversation.messages, conversation.tools, agent, "row")
            told = "".join(message["content"] for message in written)
            assert all(tool["function"]["name"] in told for tool in conversation.tools)


def test_toolbench_completes_its_own_system_message() -> None:
    (row, *_) = shared_rows("agent/toolbench/answer")
    plain, written = to_conversation(row, "row"), to_conversation(row, "row", agent=FORMATS["toolbench"])
    own, system = plain.messages[0]["content"], written.messages[0]["content"]
    step = "with a function call to actually excute your step."
    assert system.startswith(own.partition(step)[0] + step + " Your output should follow this format:\nThought:\n")
    names = [tool["function"]["name"] for tool in plain.tools or ()]
    listed = json.loads(system.partition("you have access to the following APIs: ")[2])
    assert [function["name"] for function in listed] == names


BY_QWEN_AGENT = {
    "qwen_en": "cd005b16bd0bb9a2",
    "qwen_en_parallel": "3acaca36c2460e82",
    "qwen_zh": "f82627fd7f589425",
    "qwen_zh_parallel": "f7232ac77faa5f51",
}
"""sha256 (16 digits) of what Qwen-Agent 0.0.34 (its QwenFnCallPrompt) makes of the rows below."""


@pytest.mark.parametrize("name", BY_QWEN_AGENT)
def test_qwen_is_to_the_letter_what_qwen_agent_writes(name: str) -> None:
    """191 conversations with tools that do not end in a call (ours then ends in the keyword that stops the model)."""
    digest, num_rows = hashlib.sha256(), 0
    for row in [*shared_rows("sft/glaive_toolcall_en_demo.json"), *shared_rows("agent/toolbench/answer")]:
        plain = to_conversation(row, "row")
        told = all({"description", "parameters"} <= tool["function"].keys() for tool in plain.tools or ())
        if plain.tools and told and "tool_calls" not in plain.messages[-1]:
            written = as_text(plain.messages, plain.tools, FORMATS[name], "row")
            digest.update(json.dumps([(message["role"], message["content"]) for message in written]).encode())
            num_rows += 1
    assert (num_rows, digest.hexdigest()[:16]) == (191, BY_QWEN_AGENT[name])
