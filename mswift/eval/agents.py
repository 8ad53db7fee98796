"""The tasks of agents: ToolBench's static metrics, and function calls by BFCL's AST match. Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mswift.agent.calls import to_json
from mswift.agent.conversation import as_text, opening, read_reply, write_reply
from mswift.agent.format import AgentFormat, function_of
from mswift.agent.formats import FORMATS
from mswift.agent.keywords import React
from mswift.data.formats import required_row
from mswift.data.rows import to_conversation
from mswift.data.selection import Selection, selected_parts
from mswift.data.sources import parse_source
from mswift.errors import DataError
from mswift.eval import text, toolbench
from mswift.eval.documents import Doc, json_lines, need
from mswift.eval.function_calls import mismatch
from mswift.eval.statistics import Metric
from mswift.eval.task import Settings, Task, Values, sampled
from mswift.infer.request import Request, Sampling

_OWN = Sampling(512)
_SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}


def _format(settings: Settings, default: str) -> AgentFormat:
    return FORMATS[settings.agent_template or default]


def _request(messages: Sequence[Mapping[str, Any]], agent: AgentFormat, settings: Settings) -> Request:
    """A conversation that has become text; a turn under way, behind a result, goes on."""
    left = [dict(message) for message in messages]
    begun = opening(left)
    plain = tuple({"role": message["role"], "content": message["content"]} for message in left)
    own = sampled(_OWN, settings)
    sampling = replace(own, stop=(*own.stop, *agent.stop))
    return Request(messages=plain, opening=begun, shown=agent.tokens, sampling=sampling)


def _read_steps(path: Path) -> list[Doc]:
    """Every turn of the assistant in conversations with tools: what precedes it, the tools, and the turn."""
    docs = []
    for _, _, records in selected_parts(parse_source(str(path), "--eval_dataset"), 0, Selection()):
        for record in records:
            talk = to_conversation(required_row(record), record.where, for_training=False)
            if not talk.tools:
                raise DataError(f"{record.where}: toolbench scores steps with tools, and this row has none")
            for index, message in enumerate(talk.messages):
                if message["role"] == "assistant":
                    before = list(talk.messages[:index])
                    docs.append({"messages": before, "tools": talk.tools, "reply": message, "where": record.where})
    return docs


def _ask_step(doc: Doc, examples: Sequence[Doc], settings: Settings) -> Request:
    agent = _format(settings, "toolbench")
    return _request(as_text(doc["messages"], doc["tools"], agent, doc["where"]), agent, settings)


def step_text(said: str, agent: AgentFormat, *, behind_results: bool) -> str:
    """A turn as ReAct text: as it stands where the template writes that, else its words and its last call."""
    if isinstance(agent, React):
        return said.strip().removesuffix(agent.result_key)
    reply = read_reply(said, agent, behind_results=behind_results)
    if not reply.calls:
        return reply.content
    return f"{reply.content}\nAction: {reply.calls[-1].name}\nAction Input: {to_json(reply.calls[-1].arguments)}"


def _score_steps(docs: Sequence[Doc], texts: Sequence[Sequence[str]], settings: Settings) -> list[Values]:
    agent = _format(settings, "toolbench")
    values: list[Values] = []
    for doc, given in zip(docs, texts, strict=True):
        behind = bool(doc["messages"]) and doc["messages"][-1]["role"] == "tool" and agent.inline
        target = step_text(write_reply(doc["reply"], agent, doc["where"]), agent, behind_results=False)
        prediction = step_text(given[0], agent, behind_results=behind)
        names = [function_of(tool)["name"] for tool in doc["tools"]]
        values.append({**toolbench.scores(prediction, target, names)})
    return values


def _need_rouge(settings: Settings) -> None:
    text.rouge_l_words("", "")


def _toolbench_metrics(settings: Settings) -> tuple[Metric, ...]:
    return (
        Metric("plan_em", binary=True),
        Metric("act_em", binary=True),
        Metric("f1"),
        Metric("hallu_rate", binary=True, higher_is_better=False),
        Metric("rouge_l"),
    )


def _read_bfcl(path: Path) -> list[Doc]:
    """BFCL's prompts (question, function) with ground_truth, or with the file of answers beside: NAME.answers.jsonl."""
    rows = list(json_lines(path))
    beside = (path.with_name(f"{path.stem}.answers{path.suffix}"), path.parent / "possible_answer" / path.name)
    known: dict[str, Any] = {}
    for file in beside:
        if file.is_file():
            known |= {row["id"]: row["ground_truth"] for _, row in json_lines(file)}
    docs = []
    for where, row in rows:
        doc = {"ground_truth": known.get(str(row.get("id"))), **row}
        need(doc, where, question=list, function=list, ground_truth=list)
        docs.append({**doc, "where": where})
    return docs


def _json_schema(value: Any) -> Any:
    """BFCL's types as JSON Schema names them."""
    if isinstance(value, list):
        return [_json_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _json_schema(item) for key, item in value.items()}
    if isinstance(kind := value.get("type"), str):
        found["type"] = _SCHEMA_TYPES.get(kind, kind)
    return found


def _ask_call(doc: Doc, examples: Sequence[Doc], settings: Settings) -> Request:
    agent = _format(settings, "hermes")
    tools = [{"type": "function", "function": _json_schema(function)} for function in doc["function"]]
    return _request(as_text(doc["question"][0], tools, agent, doc["where"]), agent, settings)


def _score_calls(docs: Sequence[Doc], texts: Sequence[Sequence[str]], settings: Settings) -> list[Values]:
    agent = _format(settings, "hermes")
    values: list[Values] = []
    for doc, given in zip(docs, texts, strict=True):
        calls = agent.read(given[0]).calls
        right = mismatch(calls, doc["function"], doc["ground_truth"]) is None
        values.append({"ast_match": float(right), "calls": float(bool(calls))})
    return values


AGENT_TASKS = (
    Task(
        "toolbench",
        "ToolBench's static metrics on every step: answer trees, or any conversations with tools",
        _read_steps,
        _toolbench_metrics,
        _ask_step,
        _score_steps,
        wants_chat=True,
        check=_need_rouge,
    ),
    Task(
        "bfcl",
        "function calls by BFCL's AST match: its prompts, with NAME.answers.jsonl beside them",
        _read_bfcl,
        lambda settings: (Metric("ast_match", binary=True), Metric("calls", binary=True)),
        _ask_call,
        _score_calls,
        wants_chat=True,
    ),
)
