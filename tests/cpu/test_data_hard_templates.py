"""Property: the trained tokens are the assistants' texts and ends of turn, for shared rows and templates of all kinds.

What a template cannot write (two users in turn, results, tools) must be refused, never learned in part.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mswift.agent.calls import Reply, calls_of
from mswift.agent.format import split_thinking
from mswift.agent.formats import FORMATS
from mswift.data.rows import to_conversation
from mswift.data.spans import tokenize
from mswift.data.template import ChatTemplate
from mswift.data.tokenizer import load_tokenizer
from mswift.errors import DataError
from tests.support import chat_templates
from tests.support.shared import shared_file
from tests.support.tiny import CHAT_TEMPLATE
from tests.unit.test_agent import shared_rows

END = "<|im_end|>"
EMPTY = "<think>\n\n</think>\n\n"
ROWS = {  # file: (every how many rows)
    "sft/alpaca_en_demo.json": 90, "sft/alpaca_zh_demo.json": 60, "sft/identity.json": 30, "sft/v1_sft_demo.jsonl": 10,
    "sft/glaive_toolcall_en_demo.json": 20, "sft/kto_en_demo.json": 40, "sft/dpo_en_demo.json": 60,
    "sft/dpo_zh_demo.json": 20, "sft/reason_tool_use_demo_50.jsonl": 8, "sft/formats/chatml.jsonl": 1,
    "sft/formats/sharegpt.jsonl": 1, "sft/formats/swift_multi.json": 1, "pref/hh_harmless_200.jsonl": 40,
    "agent/toolbench/answer": 1,
}  # fmt: skip
Said = Callable[[Reply], str]


def thinking_first(reply: Reply) -> str:
    """Every turn that is learned is the last one, whose thinking is written, empty if need be."""
    thinking, words = split_thinking(reply.content)
    thought = thinking.removeprefix("<think>").removesuffix("</think>").strip("\n")
    words = Reply(words.lstrip("\n"), reply.calls)
    return f"<think>\n{thought}\n</think>\n\n{FORMATS['hermes'].write(words, '')}"


TEMPLATES: dict[str, tuple[str, Said]] = {
    "tiny": (CHAT_TEMPLATE, lambda reply: reply.content),
    "plain": (chat_templates.PLAIN, lambda reply: reply.content),
    "gemma": (chat_templates.MERGES_SYSTEM, lambda reply: reply.content.strip()),
    "strips": (chat_templates.STRIPS_THINKING, thinking_first),
    "qwen3": (chat_templates.QWEN3, thinking_first),
    "deepseek_r1": (chat_templates.DEEPSEEK_R1, lambda reply: thinking_first(reply).removeprefix("<think>\n")),
    "llama3": (chat_templates.LLAMA31, lambda reply: FORMATS["llama3"].write(reply, "").strip()),
    "mistral": (chat_templates.MISTRAL, lambda reply: FORMATS["mistral"].write(reply, "")),
}
REFUSALS = (
    "which the chat template ignores", "the chat template leaves out this", "the chat template refuses the turns",
    "the chat template does not write all of the turn",
)  # fmt: skip


@pytest.fixture(scope="module")
def qwen() -> Any:
    return load_tokenizer(shared_file("data/tokenizers/qwen2-8k"))


@cache
def conversations() -> list[Any]:
    return [to_conversation(row, "row") for file, step in ROWS.items() for row in shared_rows(file)[::step]]


def learned(tokenizer: Any, sample: Any) -> list[str]:
    edges = [0, *(np.flatnonzero(np.diff(sample.loss_weights)) + 1), len(sample.tokens)]
    return [tokenizer.decode(sample.tokens[a:b]) for a, b in pairwise(edges) if sample.loss_weights[a]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_trained_tokens_are_the_assistants_texts(qwen: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    template, said = TEMPLATES[name]
    monkeypatch.setattr(qwen, "chat_template", template)
    chat = ChatTemplate(qwen)
    counts = Counter[str]()
    for conversation in conversations():
        try:
            renderings = chat.render(conversation, "row")
        except DataError as error:
            counts[next((reason for reason in REFUSALS if reason in str(error)), str(error))] += 1
            continue
        counts["learned"] += 1
        found = [text for s in tokenize(qwen, renderings, ["row"] * len(renderings)) for text in learned(qwen, s)]
        answers = [m for m in conversation.messages if m["role"] == "assistant"]
        replies = [Reply(message["content"], calls_of(message, "row")) for message in answers]
        wanted = [said(reply) + END for reply in replies]
        if name == "qwen3":  # turns between two calls after the user's last message have no empty thinking
            found, wanted = ([text.removeprefix(EMPTY) for text in texts] for texts in (found, wanted))
        assert found == wanted
    assert set(counts) <= {"learned", *REFUSALS}
    assert counts["learned"] >= (80 if name in ("qwen3", "llama3", "mistral") else 69), (
        counts
    )  # of 86: with tools or not


def test_what_each_cannot_write_is_refused(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    user, tool = {"role": "user", "content": "q"}, {"role": "tool", "content": 'a "result"\nof two lines'}
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    calling, answer = {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "assistant", "content": "a"}
    cases = [
        ("deepseek_r1", [user, calling, tool, answer], r"message 2: the chat template does not write all of the turn"),
        ("deepseek_r1", [user, answer, tool, answer], r"message 3: the chat template leaves out this tool message"),
        ("gemma", [user, user, answer], r"message 3: the chat template refuses .*must alternate"),
        ("llama3", [user, {**calling, "tool_calls": [call, call]}], "message 2: .* only single calls"),
        ("llama3", [user, {**calling, "content": "I look."}], "message 2: the chat template does not write all"),
        ("mistral", [user, answer, {"role": "system", "content": "s"}, user, answer], "a system message comes first"),
    ]
    for name, messages, message in cases:
        monkeypatch.setattr(qwen, "chat_template", TEMPLATES[name][0])
        with pytest.raises(DataError, match=f"^row, .*{message}"):
            ChatTemplate(qwen).render(to_conversation({"messages": messages}, "row"), "row")
    for name in ("qwen3", "llama3", "mistral"):  # a result as it is, and as JSON
        monkeypatch.setattr(qwen, "chat_template", TEMPLATES[name][0])
        assert ChatTemplate(qwen).render(to_conversation({"messages": [user, calling, tool, answer]}, "row"), "row")


def test_thinking_that_the_prompt_opens_is_not_learned_twice(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-R1: <think> is the prompt's; a template that drops the thinking itself is still refused."""
    monkeypatch.setattr(qwen, "chat_template", chat_templates.DEEPSEEK_R1)
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."}
    messages = [{"role": "user", "content": "q"}, thought, {"role": "user", "content": "r"}, thought]
    renderings = ChatTemplate(qwen).render(to_conversation({"messages": messages}, "row"), "row")
    first, second = tokenize(qwen, renderings, ["row"] * 2)
    assert learned(qwen, first) == learned(qwen, second) == ["hm\n</think>\n\nHello.<|im_end|>"]
    assert qwen.decode(second.tokens).count("hm") == 1
    prompt = qwen.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert second.tokens[: len(prompt)].tolist() == prompt
    drops = chat_templates.DEEPSEEK_R1.replace("split('</think>')[0].split", "split('</think>')[1].split")
    monkeypatch.setattr(qwen, "chat_template", drops)
    with pytest.raises(DataError, match="row, message 2: the chat template does not write all of the turn"):
        ChatTemplate(qwen).render(to_conversation({"messages": messages}, "row"), "row")
