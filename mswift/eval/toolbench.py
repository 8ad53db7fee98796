"""ToolBench's static metrics of the SWIFT paper (arXiv 2408.05517, section 4.3), for one step of an agent. Torch-free.

A prediction and a target are ReAct texts: Thought, Action, Action Input. The step calls a tool, finishes with an
answer, or gives up. Definitions as EvalScope's tool_bench computes them: the last Action and Action Input of a text
count; `Finish` that does not say `give_answer` in readable JSON gives up; an answer that is missing or empty is the
word "None".
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from mswift.eval.text import rouge_l_words

NO_ACTION = "none"
INVALID = "invalid_hallucination_function_name"
"""What ToolBench's search writes for a call of a function that there is not."""


@dataclass(frozen=True)
class Step:
    """What a text does. `arguments`: JSON text, or the object of Finish; None, as `action`, where it gives up."""

    plan: Literal["call", "finish", "give up"]
    action: str | None = None
    arguments: Any = None
    answer: str | None = None


def read_step(text: str) -> Step:
    """Plan, action, its input and the final answer of a ReAct text."""
    arguments = text.rpartition("Action Input:")[2].strip() if "Action Input:" in text else "{}"
    action = NO_ACTION
    if "Action:" in text:
        action = text.rpartition("Action:")[2].strip().partition("Action Input:")[0].strip()
    if action != "Finish":
        return Step("call", action, arguments)
    try:
        said = json.loads(arguments)
        if said["return_type"] != "give_answer":
            return Step("give up")
        answer = str(said["final_answer"]) if "final_answer" in said else "None"
    except (ValueError, KeyError, TypeError):
        return Step("give up")
    return Step("finish", action, said, "None" if answer.strip() in ("", ".", ",") else answer)


def scores(prediction: str, target: str, tools: Collection[str]) -> dict[str, float | None]:
    """plan_em, act_em, f1, hallu_rate and rouge_l of a step; None where a metric does not apply to the target.

    act_em and f1 count where the target calls, rouge_l where it finishes. Nothing counts where the target calls a
    function that is none of `tools` (names, Finish included), nor where only the target gives up.
    """
    want, got = read_step(target), read_step(prediction)
    nothing: dict[str, float | None] = dict.fromkeys(("plan_em", "act_em", "f1", "hallu_rate", "rouge_l"))
    if want.action == INVALID or (got.action is not None and want.action != NO_ACTION and want.action not in tools):
        return nothing
    made_up = got.action is not None and got.action != NO_ACTION and got.action not in tools
    found = {**nothing, "plan_em": float(want.plan == got.plan), "hallu_rate": float(made_up)}
    if want.plan == "call":
        action, arguments = (NO_ACTION, "{}") if got.action is None else (got.action, got.arguments)
        found["act_em"] = float(action == want.action)
        found["f1"] = arguments_f1(arguments, want.arguments) if action == want.action else 0.0
    elif want.plan == "finish":
        found["rouge_l"] = rouge_l_words("none" if got.answer is None else got.answer, str(want.answer))
    return found


def arguments_f1(prediction: Any, target: str) -> float | None:
    """F1 of named arguments: a right name with a wrong value counts half. None where the target's are not JSON.

    No arguments wanted: 1 for none given, else 0. No objects, unreadable ones, and no name in common: 0.
    """
    try:
        wanted = json.loads(target)
    except ValueError:
        return None
    try:
        given = json.loads(prediction)
    except (ValueError, TypeError):
        return 0.0
    if wanted == {}:
        return float(given == {})
    if not (isinstance(wanted, dict) and isinstance(given, dict)):
        return 0.0
    hits = sum(1.0 if given[name] == value else 0.5 for name, value in wanted.items() if name in given)
    return 2 * hits / (len(wanted) + len(given)) if hits else 0.0
