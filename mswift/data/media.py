"""The images, videos and audios of a row, in the order of their marks in the texts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mswift.data.blocks import MARKS
from mswift.data.messages import Message
from mswift.errors import DataError

_COLUMNS = {"images": ("images", "image"), "videos": ("videos", "video"), "audios": ("audios", "audio")}
_INLINE = re.compile(r"<img>(.+?)</img>", re.DOTALL)
"""Qwen-VL's older spelling, with the path in the text."""


def collect_media(
    fields: Mapping[str, Any], messages: Sequence[Message], media: dict[str, list[Any]], where: str
) -> set[str]:
    """Add what the columns and the texts hold to `media`; the names of the columns. Texts are rewritten in place.

    Where no text has a mark, they are put before the first user's text. DataError: not as many marks as media.
    """
    for message in messages:
        if found := _INLINE.findall(message["content"]):
            media.setdefault("images", []).extend(found)
            message["content"] = _INLINE.sub(MARKS["images"], message["content"])
    used: set[str] = set()
    for name, columns in _COLUMNS.items():
        for column in columns:
            if column in fields:
                used.add(column)
                value = fields[column]
                media.setdefault(name, []).extend(value if isinstance(value, list) else [value])
    for name in [name for name, found in media.items() if found]:
        _check_marks(name, len(media[name]), messages, where)
    return used


def _check_marks(name: str, count: int, messages: Sequence[Message], where: str) -> None:
    marks = sum(message["content"].count(MARKS[name]) for message in messages)
    if marks == 0:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise DataError(f"{where}: `{name}` without a user message to put them in")
        first["content"] = MARKS[name] * count + first["content"]
    elif marks != count:
        raise DataError(f"{where}: {marks} marks {MARKS[name]} for {count} {name}; write one for each")
