"""Raw rows -> conversations or documents (`pt`): the shape is told by the names of the fields.

Nothing is guessed: a row with two possible questions, an unknown role or a field of a message that might change what is
learned is a DataError that names the row. Columns that play no part are kept in `extra`, and the caller counts them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mswift.agent.conversation import as_text
from mswift.agent.format import AgentFormat
from mswift.data import toolbench
from mswift.data.blocks import read_content
from mswift.data.fields import json_value, names, text_of, to_tools
from mswift.data.media import collect_media
from mswift.data.messages import Message, check_weights, learned_turns, read_messages, read_transcript
from mswift.data.preference import PREFERENCE_NAMES, read_preference
from mswift.data.text_files import LongText
from mswift.errors import DataError

QUERY_NAMES = ("query", "prompt", "question", "instruction", "input", "problem")
RESPONSE_NAMES = ("response", "completion", "answer", "output", "target", "solution")
MESSAGE_NAMES = ("messages", "conversations", "conversation")
TOOL_NAMES = ("tools", "functions", "function")
_ANSWER_KEY = "ground_truth"  # rows of answers alone, as BFCL keeps them in a file beside the prompts
_SHAPES = (
    "messages [{role, content}]; conversations [{from, value}]; instruction/[input/]output; query/response "
    f"(query may be called {', '.join(QUERY_NAMES[1:])}; response may be called {', '.join(RESPONSE_NAMES[1:])}); "
    "each with chosen/rejected, rejected_response or rejected_messages"
)


@dataclass(frozen=True)
class Conversation:
    """One row, normalised."""

    messages: list[Message]
    """See `mswift.data.messages`. Of a preference row: with the chosen answer."""
    tools: list[dict[str, Any]] | None
    ignored: frozenset[str]
    """Fields of the row that supervised fine-tuning does not use."""
    rejected_messages: list[Message] | None = None
    """A preference row's other conversation, whole."""
    label: bool | None = None
    """KTO: whether the answer is a good one."""
    margin: float | None = None
    """By how much the chosen answer is better."""
    media: dict[str, list[Any]] = field(default_factory=dict)
    """images, videos, audios: a path, a URL or what the column holds, for each mark in the texts in turn."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Columns that are none of these, for reward functions."""


def to_document(row: Mapping[str, Any], where: str) -> str | LongText:
    """The text of a pretraining row: `text`, or a lone `response` (ms-swift's older spelling)."""
    name = "text" if "text" in row else "response"
    if name not in row or (name == "response" and any(row.get(query) for query in QUERY_NAMES)):
        raise DataError(
            f"{where}: pt takes rows with a `text` field (or .txt files); this one has {names(row)}. "
            "Rename the field, or train on conversations with `mswift sft`"
        )
    text = row[name]
    return text if isinstance(text, LongText) else text_of(text, f"`{name}`", where)


def to_conversation(
    row: Mapping[str, Any],
    where: str,
    default_system: str | None = None,
    *,
    for_training: bool = True,
    agent: AgentFormat | None = None,
) -> Conversation:
    """Normalise a row of any accepted shape; DataError starts with `where` (file and row).

    agent: tools, calls and results become text by it, else the chat template's business.

    `for_training`: it is fine-tuned on, so there must be assistant turns, with something to learn in each, and no
    media.
    """
    conversation = read_row(row, where)
    messages = conversation.messages
    if default_system is not None and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": default_system})
    if conversation.media:
        used = ", ".join(f"`{name}`" for name in conversation.media)
        raise DataError(f"{where}: {used} cannot be trained on yet; remove the field to train on the text alone")
    if for_training:
        _check_turns(messages, where)
        check_weights(messages, where)
    return conversation if agent is None else _as_text(conversation, agent, where)


def _as_text(conversation: Conversation, agent: AgentFormat, where: str) -> Conversation:
    """The conversation without tools, calls and results; what the assistant is not to learn is in `parts`."""
    tools, rejected = conversation.tools, conversation.rejected_messages
    return replace(
        conversation,
        messages=as_text(conversation.messages, tools, agent, where),
        tools=None,
        rejected_messages=None if rejected is None else as_text(rejected, tools, agent, where),
    )


def read_row(row: Mapping[str, Any], where: str) -> Conversation:
    """Normalise a row of any accepted shape, whatever it is for: preference, reward, generation, media."""
    fields = {name: value for name, value in row.items() if value not in (None, "", [])}
    empty = set(row) - set(fields)
    if toolbench.is_answer(fields) or toolbench.is_query(fields):
        fields = toolbench.to_fields(fields, where)
    media: dict[str, list[Any]] = {}
    used, messages, rejected = _read_shape(fields, where, media, empty)
    tool_names = [name for name in TOOL_NAMES if name in fields and (name != "function" or _is_list(fields[name]))]
    if len(tool_names) > 1:
        raise DataError(f"{where} has {names(tool_names)}, and only one can be used; remove the others")
    tools = to_tools(fields[tool_names[0]], where) if tool_names else None
    _add_system(fields.get("system"), [messages, *([rejected] if rejected else [])], where)
    used |= {*tool_names, "system"} | collect_media(fields, messages, media, where)
    label, margin = _label(fields.get("label")), _margin(fields.get("margin"), where)
    read = used | ({"label"} if label is not None else set()) | ({"margin"} if margin is not None else set())
    extra = {name: value for name, value in fields.items() if name not in read | set(PREFERENCE_NAMES)}
    learnt = used - set(PREFERENCE_NAMES) | ({"chosen", "chosen_messages"} & used)
    return Conversation(messages, tools, frozenset(set(fields) - learnt), rejected, label, margin, media, extra)


def _read_shape(
    fields: Mapping[str, Any], where: str, media: dict[str, list[Any]], empty: set[str]
) -> tuple[set[str], list[Message], list[Message] | None]:
    """Names of the fields used, the messages in them, and those of the rejected conversation."""
    used, prompt = _read_prompt(fields, where, media)
    named, chosen, rejected = read_preference(fields, prompt, where, media)
    if not used and not named and _ANSWER_KEY in fields:
        return set(), [], None
    if not used and not named:
        hint = " Plain text is trained on with `mswift pt`." if "text" in fields else ""
        found = names(fields) + (f"{', and' if fields else ' but'} empty ones, {names(empty)}" if empty else "")
        raise DataError(f"{where}: unknown shape. Fields found: {found}. Accepted: {_SHAPES}.{hint}")
    return used | named, chosen, rejected


def _read_prompt(fields: Mapping[str, Any], where: str, media: dict[str, list[Any]]) -> tuple[set[str], list[Message]]:
    """The conversation that the row holds; of a preference row possibly only what comes before the answers."""
    for name in MESSAGE_NAMES:
        if name in fields:
            return {name}, read_messages(fields[name], where, media)
    queries = [name for name in QUERY_NAMES if name in fields]
    responses = [name for name in RESPONSE_NAMES if name in fields]
    if not queries:
        spoken = read_transcript(fields["text"], where) if isinstance(fields.get("text"), str) else None
        return (set(), []) if spoken is None else ({"text"}, spoken)
    alpaca = queries == ["instruction", "input"]
    for several in ([] if alpaca else queries, responses):
        if len(several) > 1:
            raise DataError(f"{where} has {names(several)}, and only one can be used; remove or rename the others")
    messages = _history(fields.get("history"), where, media)
    if alpaca:
        texts = [text_of(fields[name], f"`{name}`", where) for name in queries]
        messages += [{"role": "user", "content": "\n".join(texts)}]
    else:
        messages += _turns(fields[queries[0]], "user", queries[0], where, media)
    if responses:
        messages += _turns(fields[responses[0]], "assistant", responses[0], where, media)
    return {*queries, *responses, "history"}, messages


def _turns(value: Any, role: str, name: str, where: str, media: dict[str, list[Any]]) -> list[Message]:
    """A text of `role`, or messages (TRL's conversational prompt and completion, and BFCL's list of turns)."""
    if isinstance(value, list):
        flat = [item for part in value for item in (part if isinstance(part, list) else [part])]
        return read_messages(flat, where, media)
    spoken = read_transcript(value, where) if isinstance(value, str) else None
    return spoken or [{"role": role, "content": text_of(value, f"`{name}`", where)}]


def _history(history: Any, where: str, media: dict[str, list[Any]]) -> list[Message]:
    if history is None:
        return []
    if isinstance(history, str):
        return _history(json_value(history, "`history`", where), where, media)
    if isinstance(history, list) and history and all(isinstance(turn, dict) for turn in history):
        return read_messages(history, where, media)
    if not (isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)):
        raise DataError(f"{where}: `history` must be a list of [query, response] pairs")
    messages = []
    for question, answer in history:
        messages.append({"role": "user", "content": text_of(question, "a query", where)})
        if answer is not None:
            messages.append({"role": "assistant", "content": text_of(answer, "a response", where)})
    return messages


def _add_system(value: Any, conversations: list[list[Message]], where: str) -> None:
    if value is None:
        return
    text = read_content(value, f"{where}: `system`", {}).text if isinstance(value, list) else value
    for messages in conversations:
        if messages and messages[0]["role"] == "system":
            raise DataError(f"{where} has a `system` field and a system message; keep one of them")
        messages.insert(0, {"role": "system", "content": text_of(text, "`system`", where)})


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def _label(value: Any) -> bool | None:
    """KTO's label; one that is no yes or no is a column like any other."""
    if isinstance(value, str):
        value = {"true": True, "false": False, "1": True, "0": False}.get(value.lower())
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def _margin(value: Any, where: str) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where}: `margin` must be a number, it is {value!r}") from None


def _check_turns(messages: list[Message], where: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{where} has no assistant turn, and sft learns from nothing else: add one, remove the row, or train on it "
            "as plain text (a `text` field) with `mswift pt`"
        )
    if not (indices := learned_turns(messages)):
        raise DataError(f"{where}: `loss` is off on every assistant turn, there is nothing to learn; remove the row")
    for index in indices:
        message = messages[index]
        if not message["content"].strip() and "tool_calls" not in message:
            raise DataError(
                f"{where}, message {index + 1}: the assistant turn is empty; write its answer or remove the row"
            )
