"""ToolBench's own files (OpenBMB/ToolBench) as rows: answer trees, and queries with their API lists.

An answer tree becomes the chain of calls that its search ended with, `answer_generation.train_messages[-1]`, with the
functions as tools; prompts of the search itself ("this is not the first time you try this task", valid: false) are left
out. A query becomes a prompt with tools, named and typed as ToolBench's own inference names them.
"""

import re
from collections.abc import Mapping
from typing import Any

from mswift.data.fields import names
from mswift.errors import DataError

_TYPES = {"STRING": "string", "NUMBER": "integer", "BOOLEAN": "boolean"}
"""ToolBench's own; every other type is a string there."""
_RESERVED = ("from", "class", "return", "false", "true", "id", "and")


def is_answer(fields: Mapping[str, Any]) -> bool:
    """Whether the row is an answer tree."""
    return isinstance(fields.get("answer_generation"), dict) and isinstance(fields.get("tree"), dict)


def is_query(fields: Mapping[str, Any]) -> bool:
    """Whether the row is a query with an API list."""
    return isinstance(fields.get("api_list"), list) and "query" in fields


def to_fields(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row with `messages` and `tools`; the other columns stay."""
    try:
        return _answer_fields(fields, where) if is_answer(fields) else _query_fields(fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: not as ToolBench writes its files ({error!r})") from None


def _query_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in fields.items() if name not in ("api_list", "query")}
    tools = [_tool(api) for api in fields["api_list"]]
    return {"messages": [{"role": "user", "content": fields["query"]}], "tools": tools, **rest}


def _answer_fields(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    generation = fields["answer_generation"]
    chains = generation.get("train_messages")
    if not fields.get("win", True) or not generation.get("valid_data", True):
        raise DataError(f"{where}: the answer tree found no answer (win or valid_data is false)")
    if not (isinstance(chains, list) and chains and isinstance(chains[-1], list)):
        raise DataError(f"{where}: `answer_generation` has no train_messages, only {names(generation)}")
    messages: list[dict[str, Any]] = []
    for message in chains[-1]:
        if message.get("valid") is False:
            continue
        said = {name: value for name, value in message.items() if name not in ("valid", "content")}
        said["content"] = message.get("content") or ""
        if said["role"] == "user":
            said["content"] = said["content"].strip()
        before = messages[-1] if messages else {}
        if said["role"] == before.get("role") == "assistant" and not said["content"] and "function_call" not in before:
            before["function_call"] = said["function_call"]  # the answer in words, then the call of Finish
        else:
            messages.append(said)
    known = ("tree", "answer_generation", "win", "forward_args", "compare_candidates")
    rest = {name: value for name, value in fields.items() if name not in known}
    return {"messages": messages, "tools": generation.get("function") or [], **rest}


def _tool(api: Mapping[str, Any]) -> dict[str, Any]:
    """A function in ToolBench's naming (its `api_json_to_openai_json`), with descriptions at full length."""
    tool = standard_name(str(api["tool_name"]))
    properties: dict[str, Any] = {}
    for kind in ("required_parameters", "optional_parameters"):
        for parameter in api.get(kind) or ():
            described = {"type": _TYPES.get(str(parameter.get("type")), "string")}
            if parameter.get("description"):
                described["description"] = str(parameter["description"])
            if parameter.get("default") not in (None, ""):
                described["example_value"] = parameter["default"]
            properties[_change(standard_name(str(parameter["name"])))] = described
    required = [_change(standard_name(str(p["name"]))) for p in api.get("required_parameters") or ()]
    description = f'This is the subfunction for tool "{tool}", you can use this tool.'
    if said := (api.get("api_description") or "").strip():
        description += f'The description of this function is: "{said}"'
    parameters = {"type": "object", "properties": properties, "required": required}
    name = _change(standard_name(str(api["api_name"])))
    return {"name": f"{name}_for_{tool}"[-64:], "description": description, "parameters": parameters}


def standard_name(text: str) -> str:
    """ToolBench's `standardize`: lower case, words joined by one underscore, never beginning with a digit."""
    text = re.sub(r"_+", "_", re.sub(r"[^\u4e00-\u9fa5^a-z0-9]", "_", text.lower())).strip("_")
    return f"get_{text}" if text[:1].isdigit() else text


def _change(name: str) -> str:
    """ToolBench's `change_name`: names that Python reserves."""
    return f"is_{name}" if name in _RESERVED else name
