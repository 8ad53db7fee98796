"""What an assistant says and calls, and how JSON is read out of generated text: strictly, with a reason."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from mswift.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """A function and its arguments."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """An assistant's turn. problem: why what looks like a call is none; `content` is then the whole text."""

    content: str
    calls: tuple[Call, ...] = ()
    problem: str | None = None


class NotACall(Exception):
    """Why a generated text that looks like a call is none."""


def calls_of(message: Mapping[str, Any], where: str) -> tuple[Call, ...]:
    """The calls of a message in OpenAI's form; DataError for arguments that are no object."""
    calls = []
    for call in message.get("tool_calls", ()):
        function = call["function"]
        if not isinstance(function["arguments"], dict):
            raise DataError(
                f"{where}: the arguments of {function['name']} are {json.dumps(function['arguments'])[:60]}, and agent "
                "templates write a JSON object; write {...}"
            )
        try:
            json.dumps(function["arguments"], allow_nan=False)
        except ValueError:
            raise DataError(
                f"{where}: the arguments of {function['name']} hold a number that JSON has not (NaN, Infinity)"
            ) from None
        if not function["name"].strip():
            raise DataError(f"{where}: a call without a name")
        calls.append(Call(function["name"], function["arguments"]))
    return tuple(calls)


def to_json(value: Any, indent: int | None = None) -> str:
    """As chat templates write it (`tojson`): every character as it is."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def skip_space(text: str, start: int) -> int:
    """The first place from `start` on without white space."""
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def read_object(text: str, start: int, what: str) -> tuple[dict[str, Any], int]:
    """The JSON object at `start`, behind white space, and where it ends. NotACall for anything else."""
    return _read(text, start, what, dict, "object")


def read_list(text: str, start: int, what: str) -> tuple[list[Any], int]:
    """The JSON list at `start`, likewise."""
    return _read(text, start, what, list, "list")


def _read(text: str, start: int, what: str, kind: type[T], name: str) -> tuple[T, int]:
    start = skip_space(text, start)
    try:
        value, end = _DECODER.raw_decode(text, start)
    except ValueError as error:
        raise NotACall(f"{what} is not JSON ({error})") from None
    if not isinstance(value, kind):
        raise NotACall(f"{what} is no JSON {name}")
    return value, end


def to_call(value: Any, arguments: str, may_have: tuple[str, ...] = ()) -> Call:
    """The call in {"name": ..., `arguments`: {...}}; NotACall where that is not what it is."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"].strip():
        raise NotACall('a call has no "name"')
    if not isinstance(value.get(arguments), dict):
        raise NotACall(f'the call of {value["name"]} has no object "{arguments}"')
    if extra := sorted(value.keys() - {"name", arguments, *may_have}):
        raise NotACall(f'the call of {value["name"]} has "{extra[0]}" besides')
    return Call(value["name"], value[arguments])


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object names a field twice")
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_once)
