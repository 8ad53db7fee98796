"""Conversations with tools, calls and results -> conversations of plain text, by an agent template.

A message of the assistant may get `parts`: [(text, weight), ...], which joined are its content; what has weight 0 was
given to it (results) and is not learned. Messages of results have `of_tool`.
"""

from collections.abc import Sequence
from typing import Any

from mswift.agent.calls import Reply, calls_of
from mswift.agent.format import AgentFormat, Tool
from mswift.errors import DataError

Message = dict[str, Any]
_HOW = ("loss", "loss_scale")


def as_text(messages: Sequence[Message], tools: Sequence[Tool] | None, agent: AgentFormat, where: str) -> list[Message]:
    """The messages without `tools`, tool_calls and (unless the template has it) the role tool.

    DataError: words that would be read as a call, a result that belongs to no call, tools and no question for them.
    """
    if not tools and not any("tool_calls" in message or message["role"] == "tool" for message in messages):
        return list(messages)
    written: list[Message] = []
    for run, start in _runs(messages):
        if run[0]["role"] == "tool":
            _check_called(written, f"{where}, message {start + 1}")
            results = _as_called(run, messages[start - 1])
            _add_results(written, [message["content"] for message in results], agent)
        elif run[0]["role"] == "assistant":
            _add_reply(written, run[0], agent, f"{where}, message {start + 1}")
        else:
            written.append(dict(run[0]))
    if tools:
        _add_tools(written, tools, agent, where)
    return [_finished(message) for message in written]


def opening(messages: list[Message]) -> str:
    """What the assistant's turn, if one is under way (results were given to it), begins with; it is taken off."""
    if messages and messages[-1]["role"] == "assistant":
        return str(messages.pop()["content"])
    return ""


def read_reply(text: str, agent: AgentFormat, *, behind_results: bool) -> Reply:
    """Content and calls of a generated text."""
    return agent.read(agent.without_lead(text) if behind_results else text)


def write_reply(message: Message, agent: AgentFormat, where: str) -> str:
    """One turn of the assistant, alone."""
    return agent.write(Reply(message["content"], calls_of(message, where)), where)


def _runs(messages: Sequence[Message]) -> list[tuple[list[Message], int]]:
    """Results that follow each other together, other messages alone; with the index of the first."""
    runs: list[tuple[list[Message], int]] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool" and runs and runs[-1][0][0]["role"] == "tool":
            runs[-1][0].append(message)
        else:
            runs.append(([message], index))
    return runs


def _check_called(written: Sequence[Message], where: str) -> None:
    if not written or not written[-1].get("called"):
        raise DataError(f"{where}: the result of a tool, and no call before it that it could belong to")


def _as_called(results: Sequence[Message], reply: Message) -> Sequence[Message]:
    """Results in the order of the calls that they name, as templates tell them apart by that alone.

    As they stand where one names none, or one that `reply` does not hold.
    """
    calls = [call.get("id") for call in reply.get("tool_calls", ())]
    named = [result.get("tool_call_id") for result in results]
    if None in named or not set(named) <= set(calls) or len(set(named)) < len(named):
        return results
    return sorted(results, key=lambda result: calls.index(result["tool_call_id"]))


def _add_results(written: list[Message], texts: list[str], agent: AgentFormat) -> None:
    results = agent.results(texts)
    if agent.inline:
        written[-1]["parts"].append((results[0], 0.0))
        written[-1] |= {"called": False, "goes_on": True}
    else:
        written += [{"role": agent.result_role, "content": text, "of_tool": True} for text in results]


def _add_reply(written: list[Message], message: Message, agent: AgentFormat, where: str) -> None:
    text = write_reply(message, agent, where)
    weight = float(message.get("loss_scale", 1.0)) if message.get("loss", True) else 0.0
    last = written[-1] if written else {}
    called = bool(message.get("tool_calls"))
    if last.get("goes_on"):
        last["parts"].append((agent.lead(message["content"]) + text, weight))
        last |= {"called": called, "goes_on": False}
    elif agent.inline:
        written.append({"role": "assistant", "parts": [(text, weight)], "called": called, "goes_on": False})
    else:
        kept = {name: message[name] for name in _HOW if name in message}
        written.append({"role": "assistant", "content": text, "called": called, **kept})


def _add_tools(written: list[Message], tools: Sequence[Tool], agent: AgentFormat, where: str) -> None:
    own = written.pop(0)["content"] if written and written[0]["role"] == "system" else None
    if (system := agent.system(tools, own)) is not None:
        written.insert(0, {"role": "system", "content": system})
    questions = [message for message in written if message["role"] == "user"]
    if not questions:
        raise DataError(f"{where} has `tools` and no message of the user")
    questions[0]["content"] = agent.question(tools, questions[0]["content"])


def _finished(message: Message) -> Message:
    """The message as the chat template takes it."""
    message = {name: value for name, value in message.items() if name not in ("called", "goes_on")}
    if "parts" not in message:
        return message
    parts = message["parts"]
    if len(parts) == 1:
        text, weight = message.pop("parts")[0]
        return {**message, "content": text, **({} if weight == 1 else {"loss_scale": weight})}
    learned = max(weight for _, weight in parts)
    message |= {"content": "".join(text for text, _ in parts)}
    return message | ({} if learned else {"loss": False})
