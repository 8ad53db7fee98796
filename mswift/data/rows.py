"""Raw rows -> conversations (`sft`) or documents (`pt`): the shape is told by the names of the fields.

Nothing is guessed: a row with two possible questions, an unknown role or a field that would change what is learned is a
DataError that names the row. Fields that play no part are reported to the caller, which counts them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mswift.errors import DataError

Message = dict[str, Any]
"""{"role": system|user|assistant|tool, "content": str}; an assistant message may hold "tool_calls"."""

QUERY_NAMES = ("query", "prompt", "question", "instruction", "input", "problem")
RESPONSE_NAMES = ("response", "completion", "answer", "output", "target", "solution")
_MULTIMODAL_NAMES = ("image", "images", "video", "videos", "audio", "audios")
_ROLES = {
    "system": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "function_call": "function_call", "tool_call": "function_call",
    "tool": "tool", "observation": "tool", "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
_SHAPES = (
    "messages [{role, content}]; conversations [{from, value}]; instruction/[input/]output; query/response "
    f"(query may be called {', '.join(QUERY_NAMES[1:])}; response may be called {', '.join(RESPONSE_NAMES[1:])})"
)


@dataclass(frozen=True)
class Conversation:
    """One sft row, normalised."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    ignored: frozenset[str]
    """Fields of the row that play no part."""


def to_document(row: Mapping[str, Any], where: str) -> str:
    """The text of a pretraining row: `text`, or a lone `response` (ms-swift's older spelling)."""
    name = "text" if "text" in row else "response"
    if name not in row or (name == "response" and any(row.get(query) for query in QUERY_NAMES)):
        raise DataError(
            f"{where}: pt takes rows with a `text` field (or .txt files); this one has {_names(row)}. "
            "Rename the field, or train on conversations with `mswift sft`"
        )
    if not isinstance(row[name], str):
        raise DataError(f"{where}: `{name}` must be a string, it is a {type(row[name]).__name__}")
    text: str = row[name]
    return text


def to_conversation(
    row: Mapping[str, Any], where: str, default_system: str | None = None, *, for_training: bool = True
) -> Conversation:
    """Normalise an sft row of any accepted shape; DataError starts with `where` (file and row).

    `for_training`: there must be assistant turns, with something to learn in each.
    """
    fields = {name: value for name, value in row.items() if value not in (None, "", [])}
    for name in _MULTIMODAL_NAMES:
        if name in fields:
            raise DataError(f"{where}: `{name}` cannot be trained on yet; remove the field to train on the text alone")
    used, messages = _read_shape(fields, where)
    tools = _tools(fields.get("tools"), where)
    system = fields.get("system")
    if messages and messages[0]["role"] == "system":
        if system is not None:
            raise DataError(f"{where} has a `system` field and a system message; keep one of them")
    elif (system := system if system is not None else default_system) is not None:
        messages.insert(0, {"role": "system", "content": _text(system, "`system`", where)})
    if for_training:
        _check_turns(messages, where)
    return Conversation(messages, tools, frozenset(fields) - used - {"system", "tools"})


def _read_shape(fields: Mapping[str, Any], where: str) -> tuple[set[str], list[Message]]:
    """Names of the fields used, and the messages in them."""
    for name in ("messages", "conversations", "conversation"):
        if name in fields:
            return {name}, _messages(fields[name], where)
    queries = [name for name in QUERY_NAMES if name in fields]
    responses = [name for name in RESPONSE_NAMES if name in fields]
    if not queries:
        hint = " Plain text is trained on with `mswift pt`." if "text" in fields else ""
        raise DataError(f"{where}: unknown shape. Fields found: {_names(fields)}. Accepted: {_SHAPES}.{hint}")
    alpaca = queries == ["instruction", "input"]
    for names in ([] if alpaca else queries, responses):
        if len(names) > 1:
            raise DataError(f"{where} has {_names(names)}, and only one can be used; remove or rename the others")
    query = "\n".join(_text(fields[name], f"`{name}`", where) for name in queries)
    response = fields[responses[0]] if responses else None
    return {*queries, *responses, "history"}, _pair(query, response, fields.get("history"), where)


def _pair(query: Any, response: Any, history: Any, where: str) -> list[Message]:
    if history is not None and not (
        isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)
    ):
        raise DataError(f"{where}: `history` must be a list of [query, response] pairs")
    messages = []
    for question, answer in [*(history or []), (query, response)]:
        messages.append({"role": "user", "content": _text(question, "a query", where)})
        if answer is not None:
            messages.append({"role": "assistant", "content": _text(answer, "a response", where)})
    return messages


def _messages(values: Any, where: str) -> list[Message]:
    if not isinstance(values, list):
        raise DataError(f"{where}: messages must be a list, this is a {type(values).__name__}")
    messages: list[Message] = []
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise DataError(f"{where}, message {number}: must be an object with role and content")
        messages += _message(value, f"{where}, message {number}")
    return messages


def _message(value: Mapping[str, Any], where: str) -> list[Message]:
    """One message; or the two of a {human, assistant} pair."""
    fields = {name: item for name, item in value.items() if item is not None}
    if set(fields) == {"human", "assistant"}:
        return _pair(fields["human"], fields["assistant"], None, where)
    role_name, content_name = ("from", "value") if "from" in fields else ("role", "content")
    if unknown := set(fields) - {role_name, content_name}:
        raise DataError(
            f"{where}: field {_names(unknown)} would change what is learned and is not supported; "
            f"a message has `{role_name}` and `{content_name}` only"
        )
    if set(fields) != {role_name, content_name}:
        raise DataError(f"{where}: needs role and content (or from and value), has {_names(fields)}")
    role = _ROLES.get(fields[role_name]) if isinstance(fields[role_name], str) else None
    if role is None:
        raise DataError(f"{where}: unknown role {fields[role_name]!r}; accepted: {', '.join(_ROLES)}")
    content = _text(fields[content_name], f"`{content_name}`", where)
    if role == "function_call":
        return [{"role": "assistant", "content": "", "tool_calls": _tool_calls(content, where)}]
    return [{"role": role, "content": content}]


def _tool_calls(content: str, where: str) -> list[dict[str, Any]]:
    calls = _json(content, "a function call", where)
    functions = calls if isinstance(calls, list) else [calls]
    for function in functions:
        if not (isinstance(function, dict) and set(function) == {"name", "arguments"}):
            raise DataError(f'{where}: a function call must be JSON {{"name": ..., "arguments": {{...}}}}')
    return [{"type": "function", "function": function} for function in functions]


def _tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Function descriptions in OpenAI's form, from a list or its JSON text."""
    tools = _json(value, "`tools`", where) if isinstance(value, str) else value
    if not tools:
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{where}: `tools` must be a list of function descriptions")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _json(text: str, what: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: {what} is not JSON ({error.msg} at character {error.pos})") from None


def _check_turns(messages: Sequence[Message], where: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{where} has no assistant turn, and sft learns from nothing else: add one, remove the row, or train on it "
            "as plain text (a `text` field) with `mswift pt`"
        )
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message:
            raise DataError(
                f"{where}, message {number}: the assistant turn is empty; write its answer or remove the row"
            )


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} must be a string, it is a {type(value).__name__}")
    return value


def _names(names: Mapping[str, Any] | Sequence[str] | set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "no field"
