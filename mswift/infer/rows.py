"""What is answered: prompts and rows of data sets as requests, each with its own random stream. Torch-free."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mswift.agent.conversation import as_text, opening, write_reply
from mswift.agent.format import AgentFormat
from mswift.data.formats import required_row
from mswift.data.rows import to_conversation
from mswift.data.selection import Selection, selected_parts
from mswift.data.sources import parse_source
from mswift.errors import ConfigError, DataError
from mswift.infer.request import Message, Request, Sampling


@dataclass(frozen=True)
class Row:
    """A row of a data set: where it is, what is asked, and the answer that the row holds, if any."""

    where: str
    messages: tuple[Message, ...] | None
    prompt: str | None
    tools: tuple[dict[str, Any], ...] | None
    label: str | None
    agent: AgentFormat | None = None
    """The agent template by which tools, calls and results of this row have become text."""
    opening: str = ""
    """What the answer goes on from, in the same turn."""


def read_dataset(specs: Iterable[str], system: str | None, agent: AgentFormat | None = None) -> list[Row]:
    """Rows of `--val_dataset`, in order: `text` alone is continued, else the last assistant turn is the label.

    Raises ConfigError (no such file) and DataError (a row that cannot be read or asks nothing, or no row at all).
    """
    rows: list[Row] = []
    for spec in specs:
        source = parse_source(spec, "--val_dataset")
        for _, _, records in selected_parts(source, 0, Selection()):
            rows += [_to_row(required_row(record), record.where, system, agent) for record in records]
    if not rows:
        raise DataError(f"--val_dataset {' '.join(specs)}: no rows, nothing to answer")
    return rows


def _to_row(fields: dict[str, Any], where: str, system: str | None, agent: AgentFormat | None) -> Row:
    if set(fields) == {"text"} and isinstance(fields["text"], str):
        return Row(where, None, fields["text"], None, None)
    conversation = to_conversation(fields, where, system, for_training=False)
    messages, label = list(conversation.messages), None
    if not (conversation.tools or any("tool_calls" in message or message["role"] == "tool" for message in messages)):
        agent = None
    if messages and messages[-1]["role"] == "assistant":
        last = messages.pop()
        label = str(last["content"]) if agent is None else write_reply(last, agent, where)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise DataError(f"{where}: no question to answer; its last message (before the answer) must be the user's")
    if agent is None:
        return Row(where, tuple(messages), None, tuple(conversation.tools) if conversation.tools else None, label)
    written = as_text(messages, conversation.tools, agent, where)
    begun = opening(written)
    plain = tuple({"role": message["role"], "content": message["content"]} for message in written)
    return Row(where, plain, None, None, label, agent, begun)


def user_turn(text: str, system: str | None) -> tuple[Message, ...]:
    """A conversation of one question."""
    first: tuple[Message, ...] = ({"role": "system", "content": system},) if system is not None else ()
    return (*first, {"role": "user", "content": text})


def to_request(row: Row, sampling: Sampling, index: int, chat_template: bool) -> Request:
    """The request of the row at `index`; without a chat template a lone question is continued as plain text."""
    sampling = replace(sampling, seed=stream_seed(sampling.seed, index))
    if row.prompt is not None:
        return Request(prompt=row.prompt, sampling=sampling)
    if chat_template:
        stop, shown = ((*sampling.stop, *row.agent.stop), row.agent.tokens) if row.agent else (sampling.stop, ())
        sampling = replace(sampling, stop=stop)
        return Request(messages=row.messages, tools=row.tools, opening=row.opening, shown=shown, sampling=sampling)
    return Request(prompt=plain_text(row.messages or (), row.where), sampling=sampling)


def plain_text(messages: Sequence[Message], where: str) -> str:
    """The lone question of a conversation. Raises DataError where there is more that only a template could write."""
    if len(messages) != 1 or messages[0]["role"] != "user":
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"{where}: messages of {roles} need a chat template, and none is in use; "
            f"give a model whose tokenizer has one, or rows of one question each"
        )
    return str(messages[0]["content"])


def stream_seed(seed: int, index: int) -> int:
    """Seed of the index-th answer: streams of different answers and of different seeds have nothing in common."""
    if seed < 0:
        raise ConfigError(f"--seed {seed}: at least 0; try 42")
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:7], "big")
