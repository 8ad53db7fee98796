"""--loss_scale: the published tables, what their documentation says of them, and an error for any other shape.

The texts are agent turns in the published formats; the weights beside them are those that the documentation of each
table states (react: thought and answer 1, action and its input 2, the word Observation 2, what follows it 0; hermes: a
call 2; ignore_empty_think: an empty thought 0).
"""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.data.loss_scale import LossScale, parse_loss_scale, table_names
from mswift.errors import ConfigError
from tests.support.shared import shared_file

END = "<|im_end|>"
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]


def weighted(scale, text, messages=QUESTION, weight=1.0):
    """[(part of the turn, its weight)] with the end-of-turn token last."""
    pieces = parse_loss_scale(scale).pieces(messages, text + END, len(text), weight)
    starts = [start for start, _ in pieces]
    return [
        ((text + END)[start:end], weight)
        for start, end, (_, weight) in zip(starts, [*starts[1:], None], pieces, strict=True)
    ]


REACT = [
    ("Thought: I should look it up.\n", 1),
    ('Action: get_weather\nAction Input: {"city": "Paris"}\nObservation:', 2),
    (" 22 degrees\n", 0),
    ("Thought: now I know\nFinal Answer: It is warm." + END, 1),
]
GOLDEN = [
    ("react", REACT),
    ("alpha_umi", [("Thought: a\n", 1), ("Next: caller\nAction: f\nAction Input: {}\nObservation:", 2), (" x", 0),
                   (END, 1)]),
    ("qwen", [("Let me see.\n", 1), ("✿FUNCTION✿: f\n✿ARGS✿: {}\n", 2), ("✿RETURN✿: ok\n", 1), ("✿RESULT✿:", 2),
              (" 3\n", 0), ("✿RETURN✿: 3" + END, 1)]),
    ("hermes", [("I call.\n", 1), ('<tool_call>\n{"name": "f"}\n</tool_call>', 2), ("\n", 1),
                ('<tool_call>\n{"name": "g"}\n</tool_call>', 2), (END, 1)]),
    ("agentflan", [("Thought: a\nAction:", 1), (" f\n", 3), ("Action Input:", 1), (" {}\n", 3), ("Observation:", 2),
                   (" x\n", 0), ("Final Answer: y" + END, 1)]),
    ("ignore_empty_think", [("<think>\n\n</think>\n\n", 0), ("Warm.<think></think>" + END, 1)]),
    ("ignore_empty_think", [("</think>\n", 0), ("Warm." + END, 1)]),
    ("ignore_empty_think", [("<think>\nhm\n</think>\n\nWarm." + END, 1)]),
    ("ignore_think_prefix", [("<think>\n", 0), ("hm\n</think>\n\nWarm." + END, 1)]),
    ("default", [("Action: f" + END, 1)]),
    ("last_round+ignore_empty_think+react", [("<think>\n\n</think>\n\n", 0), *REACT]),
]  # fmt: skip


@pytest.mark.parametrize(("scale", "parts"), GOLDEN)
def test_golden(scale, parts):
    text = "".join(part for part, _ in parts).removesuffix(END)
    assert weighted(scale, text) == parts
    assert weighted(scale, text, weight=0.5) == [(part, weight / 2) for part, weight in parts]


def test_a_question_of_agentflan_weighs_the_whole_turn():
    asked = [{"role": "user", "content": "What is the value of `city`? Answer."}]
    assert weighted("agentflan", "Action: Paris\nObservation: x", asked) == [
        ("Action: Paris\nObservation: x", 3),
        (END, 1),
    ]
    later = [*asked, {"role": "assistant", "content": "Paris"}, {"role": "tool", "content": "What is the value of it?"}]
    assert weighted("agentflan", "Paris", [*later, *QUESTION]) == [("Paris" + END, 1)]


def test_tables_multiply(tmp_path):
    (tmp_path / "a.json").write_text('{"Final Answer:": [4, 0.5]}')
    (tmp_path / "b.json").write_text('{"warm|cold": 3}')
    scale = f"{tmp_path}/a.json+{tmp_path}/b.json"
    assert weighted(scale, "so warm. Final Answer: warm.") == [
        ("so ", 1), ("warm", 3), (". ", 1), ("Final Answer:", 4), (" ", 0.5), ("warm", 1.5), (".", 0.5), (END, 1),
    ]  # fmt: skip


@given(
    st.lists(st.sampled_from(["Action:", "Action Input:", "Observation:", "Thought:", "Final Answer:", "x", "\n", " "]))
)
def test_any_text_is_kept_and_weighed_as_the_keyword_before_says(parts):
    weights = {"Action:": (2, 2), "Action Input:": (2, 2), "Observation:": (2, 0)}
    text, expected, after = "".join(parts), [], 1
    for part in parts:
        own, after = (after, after) if part in ("x", "\n", " ") else weights.get(part, (1, 1))
        expected += [own] * len(part)
    found = weighted("react", text)
    assert "".join(part for part, _ in found) == text + END
    assert [weight for part, weight in found for _ in part] == expected + [1] * len(END)


def test_published_tables():
    folder = shared_file("data/sft/loss_scale")
    assert {path.stem for path in folder.glob("*.json")} == set(table_names())
    for path in folder.glob("*.json"):
        ours = Path("mswift/data/loss_scales") / path.name
        assert json.loads((Path(__file__).parents[2] / ours).read_text()) == json.loads(path.read_text())
        assert parse_loss_scale(path.stem) == parse_loss_scale(str(path))


def _turns(*roles, **flags):
    return [{"role": role, "content": role, **flags.get(f"m{n}", {})} for n, role in enumerate(roles)]


CHAT = ("system", "user", "assistant", "user", "assistant", "tool", "assistant")


@pytest.mark.parametrize(
    ("scale", "flags", "weights"),
    [
        ("default", {}, {2: 1, 4: 1, 6: 1}),
        ("default", {"m2": {"loss": False}, "m4": {"loss_scale": 0.5}}, {4: 0.5, 6: 1}),
        ("last_round", {}, {4: 1, 6: 1}),
        ("last_round+react", {"m4": {"loss": False}}, {6: 1}),
        ("last_round", {"m2": {"loss": True}}, {2: 1, 4: 1, 6: 1}),
        ("last_round", {"m2": {"loss_scale": 2.0}, "m6": {"loss_scale": 0.0}}, {2: 2, 4: 1}),
        ("all", {"m2": {"loss": False}}, {2: 0, 4: 1, 6: 1}),
    ],
)
def test_turns(scale, flags, weights):
    assert parse_loss_scale(scale).turn_weights(_turns(*CHAT, **flags)) == weights


def test_a_last_round_without_an_answer_has_nothing():
    assert parse_loss_scale("last_round").turn_weights(_turns("user", "assistant", "user")) == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("last_rond", "--loss_scale last_rond: 'last_rond' is none of default, .*agentflan.*did you mean last_round"),
        ("", "--loss_scale : '' is none of"),
        ("all+default", "all and default exclude each other"),
        ("{}/none.json", "none.json cannot be read as JSON"),
        ("react+{}/bad.json", r"react\+.*bad.json cannot be read as JSON"),
        ("{}/list.json", "list.json is no table of weights: a table is"),
        ("{}/empty.json", "empty.json is no table of weights"),
        ("{}/three.json", r"three.json: 'a' has \[1, 2, 3\], not 1 or 2 numbers"),
        ("{}/negative.json", r"negative.json: 'a' has \[-1\], not 1 or 2 numbers that are 0 or from 1e-6"),
        ("{}/text.json", "text.json: 'a' has \"2\""),
        ("{}/mixed.json", "'k' has two weights .a keyword. and 'r' has one .a regular expression.; make two files"),
        ("{}/regex.json", r"'\(' is no regular expression"),
        ("{}/query.json", r"query.json: 'w' has \[1, 2\], not 1 numbers"),
        ("{}/more.json", "beside `response` there can be a table `query` and nothing else"),
    ],
)  # fmt: skip
def test_anything_else_is_an_error(tmp_path, value, message):
    files = {
        "bad": "{", "list": "[1]", "empty": "{}", "three": '{"a": [1, 2, 3]}', "negative": '{"a": [-1]}',
        "text": '{"a": "2"}', "mixed": '{"k": [1, 2], "r": [1]}', "regex": '{"(": [1]}',
        "query": '{"response": {"k": [1, 2]}, "query": {"w": [1, 2]}}',
        "more": '{"response": {"k": [1, 2]}, "other": {}}',
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_loss_scale(value.format(tmp_path))


def test_default():
    assert parse_loss_scale("default") == LossScale()
    assert parse_loss_scale("hermes") == parse_loss_scale("default+hermes")
