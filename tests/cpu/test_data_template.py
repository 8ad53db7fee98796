"""The loss mask: against transformers' own assistant mask on every shared row, and templates of the hard kinds."""

import json

import numpy as np
import pytest

from mswift.data.formats import required_row
from mswift.data.rows import Conversation, to_conversation
from mswift.data.selection import Selection, selected_parts
from mswift.data.sources import parse_source
from mswift.data.spans import tokenize
from mswift.data.template import ChatTemplate
from mswift.data.tokenizer import load_tokenizer
from mswift.errors import ConfigError, DataError
from tests.support import chat_templates
from tests.support.shared import shared_file

FILES = [
    "alpaca_en_demo.json", "alpaca_zh_demo.json", "identity.json", "glaive_toolcall_en_demo.json", "kto_en_demo.json",
    "formats/chatml.jsonl", "formats/sharegpt.jsonl", "formats/swift_multi.json",
]  # fmt: skip
U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello there."}
S = {"role": "system", "content": "Be kind."}
U2, A2 = {"role": "user", "content": "more"}, {"role": "assistant", "content": "Good day."}
END = "<|im_end|>"


@pytest.fixture(scope="module")
def qwen():
    return load_tokenizer(shared_file("data/tokenizers/qwen2-8k"))


@pytest.fixture
def with_template(qwen, monkeypatch):
    """The tokenizer with another chat template."""

    def change(template):
        monkeypatch.setattr(qwen, "chat_template", template)
        return qwen

    return change


def _rows(spec):
    """Rows of a file of ../shared."""
    source = parse_source(str(spec))
    return [required_row(record) for _, _, records in selected_parts(source, 0, Selection()) for record in records]


def _samples(tokenizer, messages, tools=None):
    renderings = ChatTemplate(tokenizer).render(Conversation(messages, tools, frozenset()), "a.jsonl, row 3")
    return tokenize(tokenizer, renderings, ["a.jsonl, row 3"] * len(renderings))


def _learned(tokenizer, sample):
    """Texts of the runs of learned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (sample.loss_weights > 0).astype(int), [0]])))
    return [tokenizer.decode(sample.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _disagreements(tokenizer, file, break_mask=lambda mask: mask):
    """Rows whose tokens or mask differ from transformers' own; and the number of rows."""
    different, total = [], 0
    template = ChatTemplate(tokenizer)
    for number, row in enumerate(_rows(shared_file(f"data/sft/{file}")), start=1):
        conversation = to_conversation(row, f"row {number}")
        (sample,) = tokenize(tokenizer, template.render(conversation, f"row {number}"), [f"row {number}"])
        want = tokenizer.apply_chat_template(
            conversation.messages, tools=conversation.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        total += 1
        n = len(sample.tokens)  # what follows the last answer is left out
        same = sample.tokens.tolist() == want["input_ids"][:n] and not any(want["assistant_masks"][n:])
        if not same or break_mask(sample.loss_weights > 0).tolist() != [bool(m) for m in want["assistant_masks"][:n]]:
            different.append(number)
    return different, total


@pytest.mark.parametrize("file", FILES)
def test_tokens_and_mask_are_those_of_transformers(qwen, file):
    assert _disagreements(qwen, file)[0] == []


def test_partner_a_mask_with_the_user_turn_fails(qwen):
    """The comparison can fail: a mask that also has the token before the answer is found in every row."""
    different, total = _disagreements(qwen, "identity.json", lambda mask: mask | np.roll(mask, -1))
    assert len(different) == total == 91


@pytest.mark.parametrize("file", FILES)
def test_the_learned_tokens_are_the_assistants_texts(qwen, file):
    template = ChatTemplate(qwen)
    for row in _rows(f"{shared_file(f'data/sft/{file}')}#120"):
        conversation = to_conversation(row, "row")
        (sample,) = tokenize(qwen, template.render(conversation, "row"), ["row"])
        turns = [m for m in conversation.messages if m["role"] == "assistant"]
        learned = _learned(qwen, sample)
        assert len(learned) == len(turns)
        for text, turn in zip(learned, turns, strict=True):
            assert text.endswith(END)
            if "tool_calls" not in turn:
                assert text == turn["content"] + END
                continue
            calls = [json.loads(part.split("</tool_call>")[0]) for part in text.split("<tool_call>\n")[1:]]
            assert calls == [call["function"] for call in turn["tool_calls"]]


def test_the_form_of_the_demo(qwen):
    (sample,) = _samples(qwen, [U, A])
    assert qwen.decode(sample.tokens) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHello there.<|im_end|>\n"
    )
    assert _learned(qwen, sample) == ["Hello there.<|im_end|>"]


def test_messages_after_the_last_answer_are_left_out(qwen):
    (with_question,), (without,) = _samples(qwen, [U, A, U2]), _samples(qwen, [U, A])
    assert with_question.tokens.tolist() == without.tokens.tolist()


def test_without_marks_the_spans_are_the_same(qwen, with_template):
    marked = _samples(qwen, [S, U, A, U2, A2])
    plain = _samples(with_template(chat_templates.PLAIN), [S, U, A, U2, A2])
    assert plain[0].tokens.tolist() == marked[0].tokens.tolist()
    assert plain[0].loss_weights.tolist() == marked[0].loss_weights.tolist()


def test_an_answer_that_starts_with_line_breaks_keeps_the_prompt_of_inference(qwen):
    """The prompt's own line break and the answer's would be one token; inference starts after the prompt's."""
    answer = {"role": "assistant", "content": "\n\nHello\n"}
    (sample,) = _samples(qwen, [U, answer, U2, A2])
    prompt = qwen.apply_chat_template([U], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert sample.tokens[: len(prompt)].tolist() == prompt
    assert not sample.loss_weights[: len(prompt)].any()
    assert _learned(qwen, sample) == ["\n\nHello\n" + END, A2["content"] + END]
    whole = qwen.apply_chat_template([U, answer, U2, A2], return_dict=True)["input_ids"]
    assert whole != sample.tokens.tolist()
    assert qwen.decode(whole) == qwen.decode(sample.tokens)


def test_a_template_that_strips_earlier_thinking_gives_one_sample_per_version(with_template):
    tokenizer = with_template(chat_templates.STRIPS_THINKING)
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."}
    first, second = _samples(tokenizer, [U, thought, U2, A2])
    assert _learned(tokenizer, first) == ["<think>\nhm\n</think>\n\nHello.<|im_end|>"]
    assert _learned(tokenizer, second) == ["<think>\n\n</think>\n\nGood day.<|im_end|>"]
    assert "hm" not in tokenizer.decode(second.tokens)
    for messages, sample in (([U], first), ([U, thought, U2], second)):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert sample.tokens[: len(prompt)].tolist() == prompt
        assert sample.loss_weights.tolist().index(1.0) == len(prompt)


def test_a_template_that_merges_and_trims(with_template):
    tokenizer = with_template(chat_templates.MERGES_SYSTEM)
    (sample,) = _samples(tokenizer, [S, U, {**A, "content": " Hello. \n"}, U2, A2])
    assert tokenizer.decode(sample.tokens).startswith("<|im_start|>user\nBe kind.\n\nhi<|im_end|>\n<|im_start|>model\n")
    assert _learned(tokenizer, sample) == ["Hello.<|im_end|>", "Good day.<|im_end|>"]
    with pytest.raises(
        DataError, match=r"row 3, message 3.*refuses .*roles: user, user.*must alternate.*the user first"
    ):
        _samples(tokenizer, [U, U2, A])
    assert _samples(tokenizer, [U, A])


def test_a_tokenizer_that_marks_the_start_of_a_text():
    """Metaspace puts a space before every text it encodes: the pieces differ, the prefixes prove the boundaries."""
    tokenizer = load_tokenizer(shared_file("data/weights/stories260K-hf"))
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }} says {{ m.content }}{{ '</s>' if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant says{% endif %}"
    )
    (sample,) = _samples(tokenizer, [U, {**A, "content": "One day"}])
    assert [t.strip() for t in _learned(tokenizer, sample)] == ["One day</s>"]
    prompt = tokenizer.apply_chat_template([U], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert sample.tokens[: len(prompt)].tolist() == prompt


def test_a_token_over_the_edge_of_prompt_and_answer_is_refused():
    """'t' of the prompt and 'he' of the answer are one token, and this tokenizer puts a space before a lone 'he'."""
    tokenizer = load_tokenizer(shared_file("data/weights/stories260K-hf"))
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }} t{{ m.content }}{{ '</s>' if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant t{% endif %}"
    )
    with pytest.raises(DataError, match="row 3: the tokenizer joins the end of the prompt with the beginning of the"):
        _samples(tokenizer, [U, {**A, "content": "he end"}])


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (chat_templates.NO_PREFIX, [U, A], r"message 2: the span to learn cannot be found.*generation prompt is the"),
        (
            chat_templates.DROPS_SYSTEM,
            [S, U, A],
            "message 1: the chat template leaves out this system message; remove it",
        ),
        (
            chat_templates.DROPS_THINKING,
            [U, {**A, "content": "<think>hm</think>Hello."}],
            "message 2: the chat template does not write all of the turn: .*hm.* became 'Hello",
        ),
        (chat_templates.MARKS_SHORT, [U, A], "message 2: the {% generation %} marks .* disagree .*'Hello there.*mend"),
    ],
)
def test_templates_whose_spans_cannot_be_proved_are_refused(with_template, template, messages, message):
    with pytest.raises(DataError, match=message) as caught:
        _samples(with_template(template), messages)
    assert str(caught.value).startswith("a.jsonl, row 3")
    assert _samples(with_template(chat_templates.PLAIN), messages)


def test_marks_around_the_user_too_are_refused(with_template):
    with pytest.raises(DataError, match="has 2 pairs of {% generation %} marks for 1 assistant turns"):
        _samples(with_template(chat_templates.MARKS_USER_TOO), [U, A])
    mended = chat_templates.MARKS_USER_TOO.replace("{% generation", "{% if m.role == 'assistant' %}{% generation")
    mended = mended.replace("{% endgeneration %}", "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}")
    assert _samples(with_template(mended), [U, A])


def test_tools_that_the_template_ignores_are_refused(qwen, with_template):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert '"name": "add"' in qwen.decode(_samples(qwen, [U, A], tools)[0].tokens)
    with pytest.raises(DataError, match="row 3 has `tools`, which the chat template ignores; remove the field"):
        _samples(with_template(chat_templates.PLAIN), [U, A], tools)
    assert _samples(with_template(chat_templates.PLAIN), [U, A])


def test_a_tokenizer_without_template_or_end_names_the_remedy(with_template):
    with pytest.raises(ConfigError, match="has no chat_template, which sft needs: put the chat_template.jinja"):
        ChatTemplate(with_template(None))
    with pytest.raises(ConfigError, match="writes no special token after an assistant turn.*{{ eos_token }}"):
        ChatTemplate(with_template(chat_templates.NO_END))
    mended = chat_templates.NO_END.replace("{{ m.content }}", "{{ m.content }}{{ eos_token if m.role == 'assistant' }}")
    tokenizer = with_template(mended)
    assert _learned(tokenizer, _samples(tokenizer, [U, A])[0]) == ["Hello there.<|im_end|>"]
