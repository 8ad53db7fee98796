"""Fields of an adapter_config.json, each checked for what it may hold; CheckpointError names the field."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from mswift.errors import CheckpointError


def is_rank(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 1


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def flag(data: Mapping[str, Any], name: str, path: Path) -> bool:
    value = data.get(name) or False
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {name}={value!r} must be true or false")
    return value


def layers(data: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    value = data.get("layers_to_transform")
    layers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(n) is int for n in layers):
        raise CheckpointError(f"{path}: layers_to_transform={value!r} must be layer numbers")
    return tuple(layers)


def names(data: Mapping[str, Any], name: str, path: Path, *, required: bool = False) -> tuple[str, ...] | str:
    """A list of module names, or a pattern; () for an absent one."""
    value = data.get(name)
    if value is None and not required:
        return ()
    if isinstance(value, str):
        _check_pattern(value, name, path)
        return value
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise CheckpointError(f"{path}: {name}={value!r} must be a list of module names or a pattern")
    return tuple(value)


def patterns(data: Mapping[str, Any], name: str, path: Path, valid: Callable[[Any], bool]) -> dict[str, Any]:
    """Pattern of a module's name -> number."""
    value = data.get(name) or {}
    if not isinstance(value, dict) or not all(valid(number) for number in value.values()):
        raise CheckpointError(f"{path}: {name}={value!r} must give module names numbers")
    for pattern in value:
        _check_pattern(pattern, name, path)
    return value


def _check_pattern(pattern: str, name: str, path: Path) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"{path}: {name}={pattern!r} is no regular expression ({error})") from None
