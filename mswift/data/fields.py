"""Small readings that the row shapes share; every one names the row in its error."""

import json
from collections.abc import Iterable
from typing import Any

from mswift.errors import DataError


def text_of(value: Any, what: str, where: str) -> str:
    """A string as it is."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} must be a string, it is a {type(value).__name__}")
    return value


def json_value(text: str, what: str, where: str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: {what} is not JSON ({error.msg} at character {error.pos})") from None


def names(fields: Iterable[str]) -> str:
    """Field names as messages spell them."""
    return ", ".join(f"`{name}`" for name in sorted(fields)) or "no field"


def to_tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call in OpenAI's form with parsed arguments, from {name, arguments}, or from OpenAI's or Anthropic's own."""
    function = call.get("function") if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
    if isinstance(function, dict) and "arguments" not in function:
        for name in ("input", "parameters"):
            if name in function:
                function = {"name": function.get("name"), "arguments": function[name]}
    if not (
        isinstance(function, dict) and set(function) == {"name", "arguments"} and isinstance(function["name"], str)
    ):
        raise DataError(f'{where}: a function call must be JSON {{"name": ..., "arguments": {{...}}}}')
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json_value(arguments or "{}", f"the arguments of {function['name']}", where)
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def to_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Function descriptions in OpenAI's form, from a list (also of JSON texts, also Anthropic's) or its JSON text."""
    tools = json_value(value, "`tools`", where) if isinstance(value, str) else value
    if not tools:
        return None
    if isinstance(tools, list):
        tools = [json_value(tool, "`tools`", where) if isinstance(tool, str) else tool for tool in tools]
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{where}: `tools` must be a list of function descriptions")
    return [_to_tool(tool) for tool in tools]


def _to_tool(tool: dict[str, Any]) -> dict[str, Any]:
    if "function" in tool:
        return tool
    if "input_schema" in tool:
        tool = {("parameters" if name == "input_schema" else name): value for name, value in tool.items()}
    return {"type": "function", "function": tool}
