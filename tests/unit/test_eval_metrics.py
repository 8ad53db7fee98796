"""Scores of answers by hand: every branch of the definitions, and the estimator of pass@k against counting."""

import itertools
import json
from typing import Any

import pytest

from mswift.agent.calls import Call
from mswift.eval.answers import (
    NO_ANSWER,
    choice_scores,
    flexible_number,
    pass_at_k,
    same_number,
    same_text,
    strict_number,
)
from mswift.eval.function_calls import mismatch
from mswift.eval.toolbench import Step, arguments_f1, read_step, scores
from tests.support.shared import shared_file


def test_choices_by_likelihood_character_and_byte() -> None:
    # per character: -1, -0.9, -1.25; per byte: -1, -0.9, -0.625 (four characters of two bytes)
    assert choice_scores([-2.0, -9.0, -5.0], ["ab", "abcdefghij", "éééé"], 0) == {
        "acc": 1,
        "acc_norm": 0,
        "acc_bytes": 0,
    }
    assert choice_scores([-2.0, -9.0, -5.0], ["ab", "abcdefghij", "éééé"], 1)["acc_norm"] == 1
    assert choice_scores([-2.0, -9.0, -5.0], ["ab", "abcdefghij", "éééé"], 2)["acc_bytes"] == 1
    assert choice_scores([-1.0, -1.0], ["a", "b"], 0)["acc"] == 1  # the first wins a tie
    assert choice_scores([-1.0, -1.0], ["a", "b"], 1)["acc"] == 0


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("It is 5. #### 18", "18", "18"),
        ("#### -1,234.5 and #### 7", "-1,234.5", "7"),
        ("so $1,000 in all", NO_ANSWER, "$1,000"),
        ("7 apples", NO_ANSWER, "7"),
        ("ends with 12.", NO_ANSWER, "12."),
        ("minus -3", NO_ANSWER, "-3"),
        ("####18", NO_ANSWER, "18"),
        ("none at all", NO_ANSWER, NO_ANSWER),
        ("", NO_ANSWER, NO_ANSWER),
    ],
)
def test_numbers_in_texts(text: str, strict: str, flexible: str) -> None:
    assert (strict_number(text), flexible_number(text)) == (strict, flexible)


def test_same_number_and_same_text() -> None:
    assert same_number("$1,018.", "two steps\n#### 1018") == 1
    assert same_number("18", "#### 180") == 0
    assert same_number(NO_ANSWER, "#### 18") == 0
    assert same_text(' "False".', "false") == 1
    assert same_text("(B)", "(A)") == 0


def test_pass_at_k_is_what_counting_gives() -> None:
    for num_samples in range(1, 7):
        for num_passed in range(num_samples + 1):
            outcomes = [True] * num_passed + [False] * (num_samples - num_passed)
            for k in range(1, num_samples + 1):
                draws = [any(draw) for draw in itertools.combinations(outcomes, k)]
                assert pass_at_k(num_samples, num_passed, k) == pytest.approx(sum(draws) / len(draws))
    with pytest.raises(ValueError, match="pass@3 of 2"):
        pass_at_k(2, 1, 3)


def _act(name: str, arguments: Any) -> str:
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return f"Thought: hm\nAction: {name}\nAction Input: {written}"


ANSWER = {"return_type": "give_answer", "final_answer": "It is 17 degrees"}
EMPTY = {"return_type": "give_answer"}
TOOLS = ("weather", "news", "Finish")
CALL = _act("weather", {"city": "Bern", "unit": "C"})


@pytest.mark.parametrize(
    ("text", "step"),
    [
        (CALL, Step("call", "weather", '{"city": "Bern", "unit": "C"}')),
        ("I do not know.", Step("call", "none", "{}")),
        ("Action: news", Step("call", "news", "{}")),
        (_act("news", {}) + "\n" + CALL, Step("call", "weather", '{"city": "Bern", "unit": "C"}')),  # the last one
        (_act("Finish", ANSWER), Step("finish", "Finish", ANSWER, "It is 17 degrees")),
        (
            _act("Finish", {"return_type": "give_answer"}),
            Step("finish", "Finish", {"return_type": "give_answer"}, "None"),
        ),
        (
            _act("Finish", {"return_type": "give_answer", "final_answer": " . "}),
            Step("finish", "Finish", {"return_type": "give_answer", "final_answer": " . "}, "None"),
        ),
        (_act("Finish", {"return_type": "give_up_and_restart"}), Step("give up")),
        (_act("Finish", {}), Step("give up")),
        (_act("Finish", "[1]"), Step("give up")),
        (_act("Finish", "{not json"), Step("give up")),
        ("Action: Finish", Step("give up")),
    ],
)
def test_a_step_is_read(text: str, step: Step) -> None:
    assert read_step(text) == step


@pytest.mark.parametrize(
    ("prediction", "target", "wanted"),
    [
        (CALL, CALL, {"plan_em": 1, "act_em": 1, "f1": 1, "hallu_rate": 0}),
        # name right, value wrong: 0.5 of 1; one right and one half: 1.5 of 2
        (
            _act("weather", {"city": "Rome", "unit": "C"}),
            CALL,
            {"plan_em": 1, "act_em": 1, "f1": 0.75, "hallu_rate": 0},
        ),
        # one of two, none wrong: precision 1, recall 1/2
        (_act("weather", {"city": "Bern"}), CALL, {"plan_em": 1, "act_em": 1, "f1": 2 / 3, "hallu_rate": 0}),
        (_act("weather", {"town": "Bern"}), CALL, {"plan_em": 1, "act_em": 1, "f1": 0, "hallu_rate": 0}),
        (_act("weather", "{broken"), CALL, {"plan_em": 1, "act_em": 1, "f1": 0, "hallu_rate": 0}),
        (_act("news", {"city": "Bern"}), CALL, {"plan_em": 1, "act_em": 0, "f1": 0, "hallu_rate": 0}),
        (_act("wether", {"city": "Bern"}), CALL, {"plan_em": 1, "act_em": 0, "f1": 0, "hallu_rate": 1}),
        ("I do not know.", CALL, {"plan_em": 1, "act_em": 0, "f1": 0, "hallu_rate": 0}),
        (_act("Finish", ANSWER), CALL, {"plan_em": 0, "act_em": 0, "f1": 0, "hallu_rate": 0}),
        (_act("Finish", {}), CALL, {"plan_em": 0, "act_em": 0, "f1": 0, "hallu_rate": 0}),  # gives up
        (_act("news", {}), _act("news", {}), {"plan_em": 1, "act_em": 1, "f1": 1, "hallu_rate": 0}),
        (_act("news", {"a": 1}), _act("news", {}), {"plan_em": 1, "act_em": 1, "f1": 0, "hallu_rate": 0}),
        (_act("news", "{"), _act("news", {}), {"plan_em": 1, "act_em": 1, "f1": 0, "hallu_rate": 0}),
        (_act("news", {}), _act("news", "{"), {"plan_em": 1, "act_em": 1, "hallu_rate": 0}),  # target unreadable
        (_act("Finish", {}), _act("Finish", {}), {"plan_em": 1, "hallu_rate": 0}),  # both give up
        (CALL, _act("Finish", {}), {}),  # EvalScope leaves the step out
        (CALL, _act("gone", {}), {}),  # the target's tool is not in the list
        (CALL, _act("invalid_hallucination_function_name", {}), {}),
        ("no call", "no call either", {"plan_em": 1, "act_em": 1, "f1": 1, "hallu_rate": 0}),
    ],
)
def test_a_step_is_scored(prediction: str, target: str, wanted: dict[str, float]) -> None:
    found = {name: value for name, value in scores(prediction, target, TOOLS).items() if value is not None}
    assert found == pytest.approx(wanted)


def test_arguments_that_are_no_objects() -> None:
    assert arguments_f1("[1]", '{"a": 1}') == 0
    assert arguments_f1('{"a": 1}', "[1]") == 0


AREA = {
    "name": "math.area",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "integer"},
            "height": {"type": "float"},
            "unit": {"type": "string"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "options": {"type": "dict"},
            "points": {"type": "array", "items": {"type": "dict"}},
        },
        "required": ["base"],
    },
}
POSSIBLE = {
    "base": [10, "n"], "height": [5.0, ""], "unit": ["square metres", ""], "tags": [["a b", "c"], ""],
    "options": [{"depth": [1, 2], "mode": ["Fast", ""]}, ""], "points": [[{"x": [1]}, {"x": [2]}], ""],
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"base": 10}, None),
        ({"base": "n"}, "base is 'n', no integer"),  # the first answer is no name of a variable
        ({"base": 10.0}, "no integer"),
        ({"base": True}, "no integer"),
        ({"base": 11}, "not one of"),
        ({"base": 10, "height": 5}, None),  # a whole number is a float
        ({"base": 10, "height": "5"}, "no float"),
        ({"base": 10, "unit": "Square-Metres"}, None),
        ({"base": 10, "unit": "feet"}, "not one of"),
        ({"base": 10, "tags": ["A, B", "c"]}, None),
        ({"base": 10, "tags": ["c", "A, B"]}, "not one of"),
        ({"base": 10, "tags": [1]}, "not one of"),  # "" among the answers takes lists of anything, as BFCL does
        ({"base": 10, "options": {"depth": 2}}, None),
        ({"base": 10, "options": {"depth": 2, "mode": "fast"}}, None),
        ({"base": 10, "options": {"depth": 3}}, "not one of"),
        ({"base": 10, "options": {"mode": "fast"}}, "not one of"),
        ({"base": 10, "options": {"depth": 1, "x": 1}}, "not one of"),
        ({"base": 10, "points": [{"x": 1}, {"x": 2}]}, None),
        ({"base": 10, "points": [{"x": 2}, {"x": 1}]}, "not one of"),
        ({"base": 10, "points": [{"x": 1}]}, "not one of"),
        ({"height": 5.0}, "base is required"),
        ({"base": 10, "colour": "red"}, "colour is not a parameter"),
    ],
)
def test_a_call_matches_its_answer(arguments: dict[str, Any], reason: str | None) -> None:
    found = mismatch([Call("math_area", arguments)], [AREA], [{"math.area": POSSIBLE}])
    assert found is None if reason is None else reason in str(found)


def test_names_and_numbers_of_calls() -> None:
    right, other = Call("math.area", {"base": 10}), {**AREA, "name": "f"}
    answer = {"math.area": POSSIBLE}
    assert mismatch([], [AREA], [answer]) == "0 calls where 1 were wanted"
    assert mismatch([right, right], [AREA], [answer]) == "2 calls where 1 were wanted"
    assert "calls maths_area" in str(mismatch([Call("maths_area", {"base": 10})], [AREA], [answer]))
    assert mismatch([Call("f", {"base": 10}), right], [AREA, other], [answer, {"f": POSSIBLE}]) is None  # any order
    assert "no call matches f" in str(mismatch([right, right], [AREA, other], [answer, {"f": POSSIBLE}]))
    needed = {"math.area": {**POSSIBLE, "height": [5.0]}}
    assert mismatch([right], [AREA], [needed]) == "height is left out"


def test_every_published_answer_matches_itself() -> None:
    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in shared_file(f"data/agent/bfcl/{name}.jsonl").read_text().splitlines()]

    prompts, answers = rows("simple_python_100"), rows("simple_python_100.answers")
    assert len(prompts) == len(answers) == 100
    for prompt, answer in zip(prompts, answers, strict=True):
        assert prompt["id"] == answer["id"]
        ((name, possible),) = answer["ground_truth"][0].items()
        given = {key: values[0] for key, values in possible.items() if values[0] != ""}
        given = {key: _first(value) for key, value in given.items()}
        assert mismatch([Call(name, given)], prompt["function"], answer["ground_truth"]) is None, prompt["id"]
        assert mismatch([Call(name + "x", given)], prompt["function"], answer["ground_truth"]) is not None


def _first(value: Any) -> Any:
    """An object that takes the first of each field's possible values."""
    if isinstance(value, dict):
        return {key: values[0] for key, values in value.items() if values[0] != ""}
    return [_first(item) for item in value] if isinstance(value, list) else value
