"""Configurations as files: strict YAML recipes, and a lossless form of a whole configuration for checkpoints."""

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from mswift.config import mcore
from mswift.config.elsewhere import flag_hint
from mswift.config.schema import canonical, find, names, nearest, options_of
from mswift.errors import ConfigError

ConfigT = TypeVar("ConfigT")

COMMAND = "command"
"""Key of a recipe that says which command it is for; a config class says so with an attribute of that name."""
_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "timestamp")}
_LIST = "tag:yaml.org,2002:seq"
_NULL = "tag:yaml.org,2002:null"


def read_recipe(path: Path, config_class: type) -> dict[str, list[str]]:
    """Option name -> its values as text, exactly as written (none for null), in the order of the file.

    ConfigError names file and line of an unknown or doubled key and of a value that is no scalar or list of scalars.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"recipe {path} must be a mapping of option names to values, as in `lora_rank: 8`")
    options = options_of(config_class)
    values: dict[str, list[str]] = {}
    for key, node in root.value:
        where = f"recipe {path}, line {key.start_mark.line + 1}"
        option = find(options, str(key.value))
        if option is None and key.value == COMMAND and (own := getattr(config_class, COMMAND, None)):
            if _texts(node, f"{where}: {COMMAND}") != [own]:
                raise ConfigError(f"{where}: the recipe is for `mswift {node.value}`, not for `mswift {own}`")
            continue
        if option is None:
            known, name = names(options), str(key.value)
            hint = flag_hint(canonical(name), known) or nearest(name, known)
            raise ConfigError(f"{where}: unknown key {key.value}{hint}")
        if option.name in values:
            raise ConfigError(f"{where}: {key.value} is given twice; keep one")
        if option.holds_fields:
            values.update(_fields(option.name, node, where))
        else:
            values[option.name] = _texts(node, f"{where}: {key.value}")
    return values


def recipe_command(path: Path) -> str | None:
    """The command that a recipe names (`command: sft`), or None. ConfigError for a file that is no recipe."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    command = recipe.get(COMMAND) if isinstance(recipe, dict) else None
    return None if command is None else str(command)


def _fields(name: str, node: yaml.Node, where: str) -> dict[str, list[str]]:
    """`mcore: {field: value}` as mcore.field -> texts."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{where}: {name} must be a mapping of field names to values, as in `{name}: {{bucket_size: 1000}}`"
        )
    return {f"{name}.{key.value}": _texts(value, f"{where}: {name}.{key.value}") for key, value in node.value}


def scalar_text(node: yaml.Node) -> str | None:
    """The text of one value exactly as written; None for a list, a mapping or null."""
    return str(node.value) if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS else None


def _texts(node: yaml.Node, where: str) -> list[str]:
    if isinstance(node, yaml.ScalarNode):
        if node.tag == _NULL:
            return ["none"]
        if node.tag in _SCALARS:
            return [str(node.value)]
    if isinstance(node, yaml.SequenceNode) and node.tag == _LIST:
        return [text for item in node.value for text in _texts(item, where)]
    raise ConfigError(f"{where} must be one value or a list of values")


def to_dict(config: Any) -> dict[str, Any]:
    """Every field of a configuration as JSON and YAML hold it: tuples become lists."""
    items = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {name: to_plain(value) for name, value in items}


def to_plain(value: Any) -> Any:
    """One value as JSON and YAML hold it."""
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def from_dict(config_class: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Inverse of `to_dict`. ConfigError for an unknown name, a missing required one or a value of another type."""
    hints = get_type_hints(config_class)
    options = options_of(config_class)
    for name in values:
        if name not in options:
            raise ConfigError(f"{config_class.__name__} has no {name}{nearest(name, options)}")
    for option in options.values():
        if option.required and option.name not in values:
            raise ConfigError(f"{config_class.__name__} needs {option.name}")
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in typed.items():
        if not _is(value, hints[name]):
            raise ConfigError(f"{config_class.__name__}.{name} is {value!r}; it takes {options[name].accepted}")
    return config_class(**typed)


def _is(value: Any, kind: Any) -> bool:
    """Whether `value` has the type `kind`; a bool is no number, a whole number is a float."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_is(value, member) for member in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(item, inner[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def dump(config: Any) -> str:
    """A configuration as YAML; it is a recipe for the same command."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=10_000)


def load(config_class: type[ConfigT], text: str) -> ConfigT:
    """Inverse of `dump`; ConfigError as `from_dict`."""
    return from_dict(config_class, yaml.safe_load(text))


def to_arguments(config: Any) -> list[str]:
    """The flags that make this configuration: what differs from the defaults, in the order of the fields."""
    arguments: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if isinstance(value, Mapping):
            for name, item in value.items():
                first, *others = mcore.spelled(item)
                arguments += [f"--{field.name}.{name}={first}", *others]
        elif isinstance(value, tuple):
            arguments += [f"--{field.name}={value[0]}", *map(str, value[1:])] if value else [f"--{field.name}"]
        else:
            arguments.append(f"--{field.name}={'none' if value is None else value}")
    return arguments


def save_yaml(config: Any, path: Path) -> None:
    """Write `dump(config)` to `path`."""
    path.write_text(dump(config), encoding="utf-8")
