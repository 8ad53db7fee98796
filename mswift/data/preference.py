"""Preference rows: two conversations, the chosen and the rejected, from every usual spelling.

chosen/rejected as texts, one message or messages, with a prompt or as whole conversations; chosen_messages and
rejected_messages; a conversation with rejected_response or rejected_messages.
"""

from collections.abc import Mapping
from typing import Any

from mswift.data.fields import names, text_of
from mswift.data.messages import Message, read_messages, read_transcript
from mswift.errors import DataError

_PAIRS = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
)
_AGAINST_MESSAGES = ("rejected_messages", "rejected_response", "rejected")
PREFERENCE_NAMES = tuple(dict.fromkeys(name for pair in _PAIRS for name in pair))


def read_preference(
    fields: Mapping[str, Any], prompt: list[Message], where: str, media: dict[str, list[Any]]
) -> tuple[set[str], list[Message], list[Message] | None]:
    """Names used, the messages with the chosen answer, and the rejected conversation (None: no preference row).

    `prompt`: the row's conversation; with an answer at its end it is the chosen one.
    """
    pairs = [(chosen, rejected) for chosen, rejected in _PAIRS if chosen in fields]
    if pairs:
        if len(pairs) > 1:
            raise DataError(
                f"{where} has {names(name for name, _ in pairs)}, and only one can be used; remove the others"
            )
        chosen, rejected = pairs[0]
        if rejected not in fields:
            raise DataError(f"{where} has `{chosen}` but no `{rejected}`; a preference row needs both")
        if prompt and prompt[-1]["role"] == "assistant":
            raise DataError(f"{where} has `{chosen}` and an answer besides; a preference row ends with a question")
        sides = [_continue(prompt, fields[name], name, where, media) for name in (chosen, rejected)]
        return {chosen, rejected}, sides[0], sides[1]
    found = [name for name in _AGAINST_MESSAGES if name in fields]
    if not found:
        return set(), prompt, None
    if len(found) > 1:
        raise DataError(f"{where} has {names(found)}, and only one can be used; remove the others")
    if not prompt or prompt[-1]["role"] != "assistant":
        raise DataError(f"{where} has `{found[0]}` but no answer to prefer to it; add the chosen answer")
    question = prompt[: max(i for i, message in enumerate(prompt) if message["role"] not in ("assistant", "tool")) + 1]
    return {found[0]}, prompt, _continue(question, fields[found[0]], found[0], where, media)


def _continue(prompt: list[Message], value: Any, name: str, where: str, media: dict[str, list[Any]]) -> list[Message]:
    """The prompt and one side's answer; a side that repeats the prompt is the whole conversation."""
    where = f"{where}, `{name}`"
    if isinstance(value, str):
        spoken = read_transcript(value, where)
        messages = spoken or [{"role": "assistant", "content": text_of(value, f"`{name}`", where)}]
    else:
        value = [value] if isinstance(value, dict) else value
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            if len(value) > 1:
                raise DataError(f"{where}: {len(value)} answers; a preference row has one, write a row for each")
            value = [{"role": "assistant", "content": value[0]}]
        messages = read_messages(value, where, {} if media else media)
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: its last message must be the assistant's")
    whole = any(message["role"] != "assistant" for message in messages[:1])
    if not whole and not prompt:
        raise DataError(f"{where}: there is no prompt to this answer; add a `prompt`, or write the whole conversation")
    return messages if whole else [*(dict(message) for message in prompt), *messages]
