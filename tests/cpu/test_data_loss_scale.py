"""Loss weights of tokens: where a table's weights lie in the text, they lie in the tokens, on every shared row."""

import json
import re
from itertools import groupby

import numpy as np
import pytest

from mswift.data.dataset import DataOptions, build_dataset
from mswift.data.loss_scale import parse_loss_scale
from mswift.data.rows import Conversation
from mswift.data.spans import tokenize
from mswift.data.template import ChatTemplate
from mswift.data.tokenizer import load_tokenizer, token_starts
from mswift.errors import DataError
from tests.support import chat_templates
from tests.support.shared import shared_file

END = "<|im_end|>"


@pytest.fixture(scope="module")
def qwen():
    return load_tokenizer(shared_file("data/tokenizers/qwen2-8k"))


def _samples(tokenizer, scale, messages):
    template = ChatTemplate(tokenizer, parse_loss_scale(scale))
    renderings = template.render(Conversation(messages, None, frozenset()), "a.jsonl, row 3")
    return tokenize(tokenizer, renderings, ["a.jsonl, row 3"] * len(renderings))


def _chat(*texts, **flags):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text, **flags.get(f"m{n}", {})} for n, text in enumerate(texts)]


def _runs(tokenizer, sample):
    """(text, weight) of runs of tokens with one weight, without what is not learned at the beginning."""
    runs = groupby(zip(sample.loss_weights.tolist(), sample.tokens.tolist(), strict=True), key=lambda pair: pair[0])
    found = [(str(tokenizer.decode([token for _, token in run])), weight) for weight, run in runs]
    return found[1:] if found[0][1] == 0 else found


def test_react(qwen):
    turn = [
        ("Thought: I look it up.\n", 1),
        ('Action: get_weather\nAction Input: {"city": "Paris"}\nObservation:', 2),
        (" 22 degrees\n", 0),
        ("Thought: now I know\nFinal Answer: warm" + END, 1),
        ("\n", 0),
    ]
    text = "".join(part for part, _ in turn[:-1]).removesuffix(END)
    assert _runs(qwen, _samples(qwen, "react", _chat("q", text))[0]) == turn
    heavier = _samples(qwen, "react", _chat("q", text, m1={"loss_scale": 3}))[0]
    assert _runs(qwen, heavier) == [(part, 3 * weight) for part, weight in turn]


def test_a_token_has_the_weight_of_its_first_character(qwen):
    """The space before the keyword is in the keyword's token, the rest of the keyword is not."""
    assert " Action" in [qwen.decode([token]) for token, _ in token_starts(qwen, "so. Action: f")]
    assert _runs(qwen, _samples(qwen, "react", _chat("q", "so. Action: f"))[0]) == [
        ("so. Action", 1), (": f", 2), (END, 1), ("\n", 0),
    ]  # fmt: skip
    assert len(token_starts(qwen, "✿")) > 1
    assert _runs(qwen, _samples(qwen, "qwen", _chat("q", "a\n✿ARGS✿: {}"))[0]) == [
        ("a\n", 1), ("✿ARGS✿: {}", 2), (END, 1), ("\n", 0),
    ]  # fmt: skip


def test_turns_and_every_token(qwen):
    chat = _chat("q one", "a one", "q two", "a two")
    assert [run for run in _runs(qwen, _samples(qwen, "default", chat)[0]) if run[1]] == [
        ("a one" + END, 1), ("a two" + END, 1),
    ]  # fmt: skip
    (last,) = _samples(qwen, "last_round", chat)
    assert _runs(qwen, last) == [("a two" + END, 1), ("\n", 0)]
    (whole,) = _samples(qwen, "all", chat)
    assert whole.tokens.tolist() == last.tokens.tolist()
    assert whole.loss_weights.tolist() == [1] * len(whole.tokens)
    (without,) = _samples(qwen, "all", _chat("q one", "a one", "q two", "a two", m1={"loss": False}))
    assert [text for text, weight in _runs(qwen, without) if not weight] == ["a one" + END]
    with pytest.raises(DataError, match="no assistant turn after the user's last message, so --loss_scale last_round"):
        _samples(qwen, "last_round", _chat("q one", "a one", "q two"))


def test_weights_have_no_place_in_a_turn_that_is_written_otherwise_later(qwen, monkeypatch):
    monkeypatch.setattr(qwen, "chat_template", chat_templates.STRIPS_THINKING)
    chat = _chat("q", "<think>\nhm\n</think>\n\na", "q", "<think>\nso\n</think>\n\nb")
    assert len(_samples(qwen, "default", chat)) == 2
    (whole,) = _samples(qwen, "all", chat)
    assert whole.loss_weights.all()
    with pytest.raises(DataError, match="message 2: --loss_scale all: .* use --loss_scale default"):
        _samples(qwen, "all+ignore_think_prefix", chat)


@pytest.mark.parametrize(
    ("file", "scale", "expression", "weight"),
    [
        ("sft/glaive_toolcall_en_demo.json#12", "hermes", r"<tool_call>.+?</tool_call>", 2),
        ("sft/alpaca_zh_demo.json#12", "{}", r"[，。]|\n\n", 0),
    ],
)
def test_shared_rows(qwen, tmp_path, file, scale, expression, weight):
    """The tokens are those without a table; of each learned one the weight is that of the text where it begins."""
    name, _, count = file.partition("#")
    (tmp_path / "table.json").write_text(json.dumps({expression: weight}))

    def build(scale):
        options = DataOptions(max_length=16384, cache_dir=tmp_path / "cache", loss_scale=parse_loss_scale(scale))
        return build_dataset("sft", [f"{shared_file(f'data/{name}')}#{count}"], qwen, options, is_writer=True,
                             barrier=lambda: None, progress=False)  # fmt: skip

    plain, weighted = build("default"), build(scale.format(tmp_path / "table.json"))
    assert len(plain) == len(weighted)
    num_matches = 0
    for number in range(len(plain)):
        before, after = plain.sample(number), weighted.sample(number)
        assert before.tokens.tolist() == after.tokens.tolist()
        assert not after.loss_weights[before.loss_weights == 0].any()
        edges = np.flatnonzero(np.diff([0, *(before.loss_weights > 0), 0]))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            texts = [qwen.decode(before.tokens[start:stop]).rstrip("�") for stop in range(start, end - 1)]
            places = [len(text) for text in texts]
            whole = qwen.decode(before.tokens[start : end - 1])
            expected = np.ones(len(whole) + 1)
            for match in re.finditer(expression, whole, re.DOTALL):
                expected[match.start() : match.end()] = weight
                num_matches += 1
            assert after.loss_weights[start:end].tolist() == [*expected[places].tolist(), 1]
    assert num_matches > 5


def test_a_table_is_part_of_the_key_by_its_content(qwen, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"query": "q", "response": "Action: f"}) + "\n")
    (tmp_path / "mine.json").write_text('{"Action:": [2, 2]}')

    def entries(scale):
        options = DataOptions(max_length=64, cache_dir=tmp_path / "cache", loss_scale=parse_loss_scale(scale))
        data = build_dataset("sft", [str(rows)], qwen, options, is_writer=True, barrier=lambda: None, progress=False)
        return data.fingerprint, len(list((tmp_path / "cache" / "tokens").iterdir()))

    first = entries(f"{tmp_path}/mine.json")
    (tmp_path / "other.json").write_text((tmp_path / "mine.json").read_text())
    assert entries(f"{tmp_path}/other.json") == first
    (tmp_path / "mine.json").write_text('{"Action:": [2, 3]}')
    changed = entries(f"{tmp_path}/mine.json")
    assert changed[0] != first[0]
    assert [first[1], changed[1]] == [1, 2]
