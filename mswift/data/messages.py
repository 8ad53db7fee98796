"""Messages in every usual spelling -> messages of one: {"role": system|user|assistant|tool, "content": str}.

Read are role/content and from/value, {human, assistant} pairs, ChatML and Human/Assistant transcripts as text, roles
`tool_call` and `tool_response` and their kin, OpenAI's tool_calls and content parts, Anthropic's tool_use, tool_result
and thinking blocks, and blocks {type, value}. An assistant message may also hold "tool_calls" in OpenAI's form with
parsed arguments, "loss" (bool) and "loss_scale" (float); a tool message "name" and "tool_call_id". Thinking is written
before the answer as "<think>\\n...\\n</think>\\n\\n"; a picture, film or sound in a text is the mark <image>, <video>
or <audio>. A field that is not known is an error: it might change what is learned.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mswift.data.blocks import Content, read_content
from mswift.data.fields import json_value, names, text_of, to_tool_call
from mswift.errors import DataError

Message = dict[str, Any]

ROLES = {
    "system": "system", "user": "user", "human": "user", "developer": "system",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "tool_call", "tool_call": "tool_call",
    "tool": "tool", "observation": "tool", "tool_response": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip
_METADATA = {"id", "timestamp", "created_at", "model", "name", "tool_call_id", "refusal", "annotations", "index"}
_WEIGHTS = ("loss", "loss_scale", "loss_weight", "weight")
_LEAST_WEIGHT = 1e-6
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\s*", re.DOTALL)
_SPOKEN = re.compile(r"\n\n(Human|Assistant):")


def read_messages(value: Any, where: str, media: dict[str, list[Any]]) -> list[Message]:
    """Normalise a list of messages, its JSON text, or a transcript; media of content parts are added to `media`."""
    if isinstance(value, str):
        if (spoken := read_transcript(value, where)) is not None:
            return spoken
        value = json_value(value, "messages", where) if value.lstrip().startswith("[") else value
    if not isinstance(value, list):
        raise DataError(f"{where}: messages must be a list, this is a {type(value).__name__}")
    messages: list[Message] = []
    for number, item in enumerate(value, start=1):
        if not isinstance(item, dict):
            raise DataError(f"{where}, message {number}: must be an object with role and content")
        for message in _read_message(item, f"{where}, message {number}", media):
            _append(messages, message)
    return messages


def read_transcript(text: str, where: str) -> list[Message] | None:
    """The messages of a text in ChatML, or in the form "\\n\\nHuman: ...\\n\\nAssistant: ..."; None of any other."""
    if text.lstrip().startswith("<|im_start|>"):
        text = text.strip()
        turns = list(_CHATML.finditer(text))
        if "".join(turn[0] for turn in turns) != text:
            raise DataError(
                f"{where}: the ChatML text is not a row of <|im_start|>ROLE\\n...<|im_end|> and nothing else"
            )
        return [{"role": _role(turn[1], where), "content": turn[2]} for turn in turns]
    if text.startswith("\n\nHuman:"):
        _, *parts = _SPOKEN.split(text)
        roles = {"Human": "user", "Assistant": "assistant"}
        return [
            {"role": roles[role], "content": said.strip()} for role, said in zip(parts[::2], parts[1::2], strict=True)
        ]
    return None


def _append(messages: list[Message], message: Message) -> None:
    """Add a message; calls written as messages of their own belong to the assistant's turn before them."""
    call = message.pop("a_call", False)
    last = messages[-1] if messages else None
    same_weight = last is not None and all(last.get(name) == message.get(name) for name in ("loss", "loss_scale"))
    if call and last is not None and last["role"] == "assistant" and same_weight:
        last.setdefault("tool_calls", []).extend(message["tool_calls"])
    else:
        messages.append(message)


def _read_message(value: Mapping[str, Any], where: str, media: dict[str, list[Any]]) -> list[Message]:
    """One message, or the two of a {human, assistant} pair, or the tool results and the text of a user's turn."""
    fields = {name: item for name, item in value.items() if item is not None}
    if set(fields) == {"human", "assistant"}:
        return [
            {"role": role, "content": text_of(fields[name], f"`{name}`", where)}
            for role, name in (("user", "human"), ("assistant", "assistant"))
        ]
    role_name, content_name = ("from", "value") if "from" in fields else ("role", "content")
    called = "tool_calls" in fields or "function_call" in fields
    known = {role_name, content_name, "tool_calls", "function_call", *_WEIGHTS, *_REASONING, *_METADATA}
    if unknown := set(fields) - known:
        raise DataError(
            f"{where}: field {names(unknown)} is not known, and might change what is learned; remove it. "
            f"A message has `{role_name}`, `{content_name}` and, if need be, tool_calls, {', '.join(_WEIGHTS[:2])}"
        )
    if role_name not in fields or not (content_name in fields or called):
        raise DataError(f"{where}: needs role and content (or from and value), has {names(fields)}")
    role = _role(fields[role_name], where)
    if role == "tool_call":
        return [{"role": "assistant", "content": "", "tool_calls": _calls(fields[content_name], where), "a_call": True}
                | _weight(fields, where)]  # fmt: skip
    content = read_content(fields.get(content_name, ""), where, media)
    content.reasoning += [text_of(fields[name], f"`{name}`", where) for name in _REASONING if name in fields]
    content.calls += _openai_calls(fields, where)
    return _build(role, content, fields, where)


def _build(role: str, content: Content, fields: Mapping[str, Any], where: str) -> list[Message]:
    messages: list[Message] = []
    for identity, text in content.results:
        messages.append({"role": "tool", "content": text} | ({"tool_call_id": identity} if identity else {}))
    text = content.text
    if content.reasoning:
        text = "<think>\n{}\n</think>\n\n".format("\n".join(content.reasoning).strip("\n")) + text
    if role != "assistant" and (content.calls or content.reasoning):
        raise DataError(f"{where}: a {role} message holds a call or thinking; only an assistant's can")
    if not text and content.results:
        return messages
    message: Message = {"role": role, "content": text}
    if content.calls:
        message["tool_calls"] = content.calls
    if role == "tool":
        message |= {name: fields[name] for name in ("name", "tool_call_id") if name in fields}
    return [*messages, message | _weight(fields, where)]


def _role(name: Any, where: str) -> str:
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{where}: unknown role {name!r}; accepted: {', '.join(ROLES)}")
    return role


def _weight(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """{"loss": ...} or {"loss_scale": ...} where the message says how it is learned."""
    result: dict[str, Any] = {}
    for name in _WEIGHTS:
        value = fields.get(name)
        if value is None:
            continue
        if not is_weight(value):
            raise DataError(
                f"{where}: `{name}` must be true, false or a number from 0, it is {value!r}; "
                f"0, or from {_LEAST_WEIGHT:g} to {1 / _LEAST_WEIGHT:g}"
            )
        if name == "loss" and value not in (0, 1):
            raise DataError(f"{where}: `loss` must be true or false, it is {value!r}; a weight is called `loss_scale`")
        if value in (0, 1) and name != "loss_scale":
            result["loss"] = bool(value)
        else:
            result["loss_scale"] = float(value)
    return result


def _calls(content: Any, where: str) -> list[dict[str, Any]]:
    calls = json_value(content, "a function call", where) if isinstance(content, str) else content
    return [to_tool_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]


def _openai_calls(fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    calls: list[Any] = []
    if given := fields.get("tool_calls"):
        given = json_value(given, "`tool_calls`", where) if isinstance(given, str) else given
        calls += given if isinstance(given, list) else [given]
    if call := fields.get("function_call"):
        calls.append(json_value(call, "`function_call`", where) if isinstance(call, str) else call)
    return [to_tool_call(call, where) for call in calls]


def is_weight(value: Any) -> bool:
    """Whether a value is true, false, 0 or a number from 1e-6 to 1e6."""
    return isinstance(value, (bool, int, float)) and (value == 0 or _LEAST_WEIGHT <= value <= 1 / _LEAST_WEIGHT)


def turn_weight(message: Message) -> float:
    """What the loss of a message's tokens counts; 0: it is not learned, as no message of others than the assistant."""
    learned = message["role"] == "assistant" and message.get("loss", True)
    return float(message.get("loss_scale", 1.0)) if learned else 0.0


def learned_turns(messages: Sequence[Message]) -> list[int]:
    """Indices of the assistant's messages that are learned."""
    return [index for index, message in enumerate(messages) if turn_weight(message) > 0]


def check_weights(messages: Sequence[Message], where: str) -> None:
    """DataError for a learned turn of somebody else than the assistant."""
    for number, message in enumerate(messages, start=1):
        if message["role"] != "assistant" and (message.get("loss") or message.get("loss_scale", 0.0) > 0):
            raise DataError(
                f"{where}, message {number}: `loss` on a {message['role']} message; only assistant turns are learned"
            )
