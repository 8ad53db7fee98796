"""The content of one message -> its text, thinking, calls, results and media."""

from dataclasses import dataclass, field
from typing import Any

from mswift.data.fields import json_value, names, text_of, to_tool_call
from mswift.errors import DataError

_MEDIA = {
    "image": "images", "image_url": "images", "input_image": "images", "video": "videos", "video_url": "videos",
    "audio": "audios", "audio_url": "audios", "input_audio": "audios",
}  # fmt: skip
MARKS = {"images": "<image>", "videos": "<video>", "audios": "<audio>"}


@dataclass
class Content:
    """What is said in one message."""

    text: str = ""
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[tuple[str | None, str]] = field(default_factory=list)
    """(id of the call, text) of tool results in a user's message, as Anthropic writes them."""


def read_content(value: Any, where: str, media: dict[str, list[Any]]) -> Content:
    """A string, or a list of blocks; media are added to `media` and leave their mark in the text."""
    if isinstance(value, str):
        return Content(value)
    if not isinstance(value, list):
        raise DataError(f"{where}: `content` must be a string or a list of blocks, it is a {type(value).__name__}")
    content = Content()
    for number, block in enumerate(value, start=1):
        if isinstance(block, str):
            content.text += block
        elif isinstance(block, dict):
            _read_block({k: v for k, v in block.items() if v is not None}, f"{where}, block {number}", content, media)
        else:
            raise DataError(f"{where}, block {number}: must be an object with a type")
    return content


def _read_block(block: dict[str, Any], where: str, content: Content, media: dict[str, list[Any]]) -> None:
    kind = block.get("type")
    if kind in ("text", "input_text", "output_text"):
        content.text += text_of(block.get("text", block.get("value")), "the text of a block", where)
    elif kind in ("reasoning", "thinking"):
        said = next((block[name] for name in ("value", "thinking", "reasoning", "text") if name in block), None)
        content.reasoning.append(text_of(said, "the thinking of a block", where))
    elif kind == "tool_call":
        call = block.get("value", block)
        call = json_value(call, "a function call", where) if isinstance(call, str) else call
        content.calls += [to_tool_call(one, where) for one in (call if isinstance(call, list) else [call])]
    elif kind == "tool_use":
        content.calls.append(to_tool_call(block, where))
    elif kind in ("tool_result", "tool_response"):
        said = read_content(block.get("content", block.get("value", "")), where, media)
        content.results.append((block.get("tool_use_id"), said.text))
    elif isinstance(kind, str) and kind in _MEDIA:
        _read_media(kind, block, content, media)
    else:
        raise DataError(f"{where}: a block of type {kind!r} with {names(block)} is not known")


def _read_media(kind: str, block: dict[str, Any], content: Content, media: dict[str, list[Any]]) -> None:
    """Qwen's {type: image, image: PATH}, OpenAI's {type: image_url, image_url: {url}}, Anthropic's {source}; or a mark
    alone, whose picture is in the column of the row."""
    name = _MEDIA[kind]
    content.text += MARKS[name]
    found = next((block[key] for key in (kind, name[:-1], "source", "value", "url", "path") if key in block), None)
    if isinstance(found, dict) and "url" in found:
        found = found["url"]
    if found is not None:
        media.setdefault(name, []).append(found)
