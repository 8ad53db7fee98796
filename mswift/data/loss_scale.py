"""--loss_scale: which turns are learned, and what the tokens inside them count.

A strategy names the turns, and tables weigh their text; several tables multiply. A table is JSON in one of two shapes:
{keyword: [weight of the keyword, weight of the text from it to the next one]}, or {regular expression: [weight of its
matches]}; other text counts 1. In {"response": table, "query": {words: [weight]}} a turn whose question, the user's
last message before it, holds the words counts that weight as a whole. Expressions see the turn alone (^ is its
beginning) and dots match line breaks. The end-of-turn token is no part of the text: it counts 1.

The tables in loss_scales/ are those that ms-swift publishes; the shapes are its own.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

from mswift.config.schema import nearest
from mswift.data.batch import NO_CHANNEL
from mswift.data.messages import Message, is_weight, turn_weight
from mswift.errors import ConfigError, DataError

Strategy = Literal["default", "last_round", "all"]
Pieces = tuple[tuple[int, float], ...]
"""(character, weight from there on), ascending, the first at character 0; neighbours differ."""
_TABLES = Path(__file__).parent / "loss_scales"
_SHAPES = (
    'a table is {"keyword": [weight, weight of the text after it], ...} or {"regular expression": [weight], ...}, '
    'or {"response": one of these, "query": {"words": [weight], ...}}'
)


@dataclass(frozen=True)
class Table:
    """Weights of the text of a turn: by keywords, or by patterns."""

    keywords: tuple[tuple[str, float, float], ...] = ()
    """(keyword, its weight, that of the text after it)"""
    patterns: tuple[tuple[str, float], ...] = ()
    """(regular expression, weight of its matches)"""
    query: tuple[tuple[str, float], ...] = ()
    """(words of the question, weight of the whole turn); the first found decides."""

    def pieces(self, query: str, text: str) -> Pieces:
        """Weights of `text`, the answer to `query`."""
        for words, weight in self.query:
            if words in query:
                return ((0, weight),)
        return _merged([(0, 1.0), *(self._by_keyword(text) if self.keywords else self._by_pattern(text))])

    def _by_keyword(self, text: str) -> Iterator[tuple[int, float]]:
        weights = {keyword: (own, after) for keyword, own, after in self.keywords}
        for found in self._any_keyword.finditer(text):
            own, after = weights[found[0]]
            yield from ((found.start(), own), (found.end(), after))

    def _by_pattern(self, text: str) -> Iterator[tuple[int, float]]:
        """The match that starts first wins, then the expression that is written first; the next is sought behind it."""
        place = 0
        while place < len(text):
            found = [(m.start(), n, m.end()) for n, p in enumerate(self._compiled) if (m := _match(p, text, place))]
            if not found:
                return
            start, number, place = min(found)
            yield from ((start, self.patterns[number][1]), (place, 1.0))

    @cached_property
    def _any_keyword(self) -> re.Pattern[str]:
        longest_first = sorted((keyword for keyword, _, _ in self.keywords), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    @cached_property
    def _compiled(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(pattern, re.DOTALL) for pattern, _ in self.patterns)


@dataclass(frozen=True)
class LossScale:
    """What --loss_scale says."""

    strategy: Strategy = "default"
    """default: every assistant turn; last_round: those after the user's last message; all: every token of the text."""
    tables: tuple[Table, ...] = ()
    by_channel: bool = False
    """Rows name in `channel` under what their loss is reported apart (--enable_channel_loss)."""

    def channel(self, extra: Mapping[str, Any], where: str) -> str:
        """The channel of a row with these further columns; DataError where it is no text."""
        channel = extra.get("channel", NO_CHANNEL) if self.by_channel else NO_CHANNEL
        if not isinstance(channel, str):
            raise DataError(f"{where}: `channel` must be a text, it is {json.dumps(channel)[:80]}")
        return channel

    def turn_weights(self, messages: Sequence[Message]) -> dict[int, float]:
        """Index and weight of the assistant's messages that are learned (all: of every one, 0 where it is not).

        A message with `loss: true` or a `loss_scale` of its own is learned whatever the strategy says.
        """
        users = [index for index, message in enumerate(messages) if _asks(message)]
        first = users[-1] if users and self.strategy == "last_round" else -1
        weights = {
            index: turn_weight(message)
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and (index > first or message.get("loss") or "loss_scale" in message)
        }
        return {index: weight for index, weight in weights.items() if weight or self.strategy == "all"}

    def pieces(self, messages: Sequence[Message], text: str, end: int, weight: float) -> Pieces:
        """Weights of `text`, what is learned of a turn after `messages`; its end-of-turn token is at `end`."""
        if not self.tables:
            return ((0, weight),)
        query = next((message["content"] for message in reversed(messages) if _asks(message)), "")
        pieces: Pieces = ((0, weight),)
        for table in self.tables:
            pieces = _product(pieces, table.pieces(query, text[:end]))
        return _merged([*(piece for piece in pieces if piece[0] < end), (end, weight)])


PLAIN = LossScale()
"""Every assistant turn, every token of it the same."""


def parse_loss_scale(value: str, *, by_channel: bool = False) -> LossScale:
    """Strategy and tables, joined by +: `last_round+ignore_empty_think+react`; ConfigError for anything else.

    A part that ends in .json is a file. Without a strategy it is `default`.
    """
    strategies: tuple[str, ...] = get_args(Strategy)
    parts = value.split("+")
    chosen = [part for part in parts if part in strategies]
    if len(chosen) > 1:
        raise ConfigError(f"--loss_scale {value}: {' and '.join(chosen)} exclude each other; leave out one")
    tables = tuple(_table(part, value) for part in parts if part not in strategies)
    return LossScale(cast(Strategy, chosen[0] if chosen else "default"), tables, by_channel)


def table_names() -> list[str]:
    """The tables that come with mswift."""
    return sorted(path.stem for path in _TABLES.glob("*.json"))


def _table(part: str, value: str) -> Table:
    names = table_names()
    if not part.endswith(".json") and part not in names:
        known = [*get_args(Strategy), *names]
        raise ConfigError(
            f"--loss_scale {value}: {part!r} is none of {', '.join(known)}, and no file.json{nearest(part, known)}"
        )
    path = Path(part).expanduser() if part.endswith(".json") else _TABLES / f"{part}.json"
    where = f"--loss_scale {value}: {path}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read as JSON ({error})") from None
    if isinstance(content, dict) and "response" in content and isinstance(content["response"], dict):
        if set(content) - {"response", "query"} or not isinstance(content.get("query", {}), dict):
            raise ConfigError(f"{where}: beside `response` there can be a table `query` and nothing else")
        query = {words: _numbers(words, weights, (1,), where) for words, weights in content.get("query", {}).items()}
        table = _read(content["response"], f"{where}, `response`")
        return Table(table.keywords, table.patterns, tuple((words, w) for words, (w,) in query.items()))
    return _read(content, where)


def _read(content: Any, where: str) -> Table:
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{where} is no table of weights: {_SHAPES}")
    weights = {key: _numbers(key, value, (1, 2), where) for key, value in content.items()}
    return _by_shape(weights, where)


def _by_shape(weights: Mapping[str, tuple[float, ...]], where: str) -> Table:
    keywords = tuple((key, *value) for key, value in weights.items() if len(value) == 2)
    patterns = tuple((key, value[0]) for key, value in weights.items() if len(value) == 1)
    if keywords and patterns:
        raise ConfigError(
            f"{where}: {keywords[0][0]!r} has two weights (a keyword) and {patterns[0][0]!r} has one (a regular "
            "expression); make two files of it and join them by +"
        )
    for pattern, _ in patterns:
        try:
            re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ConfigError(f"{where}: {pattern!r} is no regular expression ({error})") from None
    return Table(keywords=keywords, patterns=patterns)


def _numbers(key: str, value: Any, lengths: tuple[int, ...], where: str) -> tuple[float, ...]:
    """The weights of a key; a number alone is a list of one."""
    numbers = value if isinstance(value, list) else [value]
    if not key or len(numbers) not in lengths or not all(is_weight(number) for number in numbers):
        raise ConfigError(
            f"{where}: {key!r} has {json.dumps(value)}, not {' or '.join(map(str, lengths))} numbers that are 0 or "
            f"from 1e-6 to 1e6; {_SHAPES}"
        )
    return tuple(float(number) for number in numbers)


def _asks(message: Message) -> bool:
    """Whether it is the user's; results that an agent template puts into the user's mouth are not."""
    return message["role"] == "user" and not message.get("of_tool")


def _match(pattern: re.Pattern[str], text: str, place: int) -> re.Match[str] | None:
    """The first match from `place` on that is not empty."""
    return next((found for found in pattern.finditer(text, place) if found.end() > found.start()), None)


def _product(one: Pieces, other: Pieces) -> Pieces:
    places = sorted({place for place, _ in one} | {place for place, _ in other})
    return _merged([(place, _at(one, place) * _at(other, place)) for place in places])


def _at(pieces: Pieces, place: int) -> float:
    return next(weight for start, weight in reversed(pieces) if start <= place)


def _merged(pieces: Sequence[tuple[int, float]]) -> Pieces:
    """Of pieces that begin at the same character the last; of neighbours with one weight the first."""
    merged: list[tuple[int, float]] = []
    for place, weight in pieces:
        if merged and merged[-1][0] == place:
            merged.pop()
        if not merged or merged[-1][1] != weight:
            merged.append((place, weight))
    return tuple(merged)
