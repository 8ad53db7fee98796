"""Function calls against their possible answers, by the rules of BFCL's AST check for Python (v4). Torch-free.

A possible answer lists the values that each parameter may take; "" among them means that it may be left out.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mswift.agent.calls import Call

Function = Mapping[str, Any]
"""BFCL's description: name, description, parameters (type "dict", properties, required)."""
Answer = Mapping[str, Mapping[str, list[Any]]]
"""{function name: {parameter: values it may take}}, one function."""

_TYPES: Mapping[str, type] = {
    "string": str, "integer": int, "float": float, "boolean": bool,
    "array": list, "tuple": list, "dict": dict, "any": str,
}  # fmt: skip
_IGNORED = re.compile(r"[ ,./\-_*^]")


def mismatch(calls: Sequence[Call], functions: Sequence[Function], answers: Sequence[Answer]) -> str | None:
    """Why the calls are not the wanted ones, None where they are; calls of several answers match in any order."""
    if len(calls) != len(answers):
        return f"{len(calls)} calls where {len(answers)} were wanted"
    left = list(calls)
    for answer in answers:
        (name,) = answer
        function = next(f for f in functions if f["name"] == name)
        reasons = []
        for call in left:
            reason = _mismatch(call, function, answer[name])
            if reason is None:
                left.remove(call)
                break
            reasons.append(reason)
        else:
            return reasons[0] if len(answers) == 1 else f"no call matches {name}: " + "; ".join(reasons)
    return None


def _mismatch(call: Call, function: Function, answer: Mapping[str, list[Any]]) -> str | None:
    """Why one call is not the wanted one. Dots in a name may be written as underscores: OpenAI's names have no dots."""
    if call.name not in (function["name"], function["name"].replace(".", "_")):
        return f"calls {call.name}, not {function['name']}"
    parameters, given = function["parameters"]["properties"], call.arguments
    for name in function["parameters"].get("required", ()):
        if name not in given:
            return f"{name} is required"
    for name, value in given.items():
        if name not in parameters or name not in answer:
            return f"{name} is not a parameter to give"
        if reason := _value_mismatch(name, value, parameters[name], answer[name]):
            return reason
    left_out = [name for name in answer if name not in given and "" not in answer[name]]
    return f"{left_out[0]} is left out" if left_out else None


def _value_mismatch(name: str, value: Any, parameter: Mapping[str, Any], allowed: list[Any]) -> str | None:
    kind = _TYPES[parameter["type"]]
    inner = _TYPES[parameter["items"]["type"]] if parameter["type"] in ("array", "tuple") else None
    if kind is float and type(value) is int:
        value = float(value)
    types = [type(item) for item in allowed if item != ""]
    variable = bool(types) and types[0] is not kind  # answers of another type are names of variables
    if type(value) is kind:
        if not _items_fit(value, inner, allowed):
            return f"{name} is {value!r}, not all of its items {parameter['items']['type']}"
    else:
        if not types or type(value) is not types[0]:
            return f"{name} is {value!r}, no {parameter['type']}"
        variable = True
    fits = value in allowed
    if not variable and kind is dict:
        fits = any(_object_fits(value, answer) for answer in allowed if answer != "")
    elif not variable and inner is dict:
        fits = any(_objects_fit(value, answer) for answer in allowed)
    elif not variable and kind is str:
        fits = _plain(value) in [_plain(answer) for answer in allowed if isinstance(answer, str)]
    elif not variable and kind is list:
        fits = _plain(value) in [_plain(list(answer)) for answer in allowed]
    return None if fits else f"{name} is {value!r}, not one of {allowed}"


def _items_fit(value: Any, inner: type | None, allowed: list[Any]) -> bool:
    """Whether the items of a list have the type asked for, or that of the items of some answer."""
    if inner is None:
        return True

    def fits(item: Any, answer: list[Any]) -> bool:
        types = [type(possible) for possible in answer if possible != ""]
        return type(item) is inner or (bool(types) and type(item) is types[0])

    return any(not isinstance(answer, list) or all(fits(item, answer) for item in value) for answer in allowed)


def _object_fits(value: Any, answer: Mapping[str, list[Any]]) -> bool:
    if not isinstance(value, dict) or any(key not in answer for key in value):
        return False
    known = all(_plain(item) in [_plain(possible) for possible in answer[key]] for key, item in value.items())
    return known and all(key in value or "" in possible for key, possible in answer.items())


def _objects_fit(value: Sequence[Any], answer: Sequence[Any]) -> bool:
    return len(value) == len(answer) and all(map(_object_fits, value, answer))


def _plain(value: Any) -> Any:
    """A string (or the strings of a list) without case, spaces and , . / - _ * ^, and with double quotes."""
    if isinstance(value, list):
        return [_plain(item) if isinstance(item, str) else item for item in value]
    return _IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value
