"""`--mcore.<field>`: megatron-core's own configuration fields, read from the source of the installed megatron-core.

Its dataclasses are parsed, not imported: a login node has no torch. Which fields are passed on is decided by name;
every other one is refused with the reason, also those that a newer megatron-core has and this mswift does not know.
"""

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mswift.config.mcore_fields import reason_against
from mswift.config.schema import NONE_SPELLINGS, nearest
from mswift.errors import ConfigError

PREFIX = "mcore."
Value = bool | int | float | str | None | list[bool | int | float | str]

_SOURCES = (
    ("ModelParallelConfig", "model_parallel_config.py"),
    ("TransformerConfig", "transformer/transformer_config.py"),
    ("DistributedDataParallelConfig", "distributed/distributed_data_parallel_config.py"),
    ("OptimizerConfig", "optimizer/optimizer_config.py"),
)
_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}


@dataclass(frozen=True)
class Field:
    """One field: its simple types ("int", "bool", ...), what it may be literally, whether a list or none will do."""

    name: str
    kinds: tuple[str, ...]
    choices: tuple[str, ...] = ()
    is_list: bool = False
    optional: bool = False

    @property
    def accepted(self) -> str:
        """What it takes, in words."""
        words = [_WORDS[kind] for kind in self.kinds] + list(self.choices) + ["none"] * self.optional
        return " or ".join(words) + (", several for a list" if self.is_list else "")


@functools.cache
def fields() -> Mapping[str, Field]:
    """Every field of the four dataclasses of the installed megatron-core; {} where none is installed."""
    found: dict[str, Field] = {}
    for class_name, file in _SOURCES:
        for name, annotation in _annotations(class_name, file):
            if not name.startswith("_"):
                found.setdefault(name, _field(name, annotation))
    return found


def parse(name: str, texts: Sequence[str], where: str) -> Value:
    """The value of `mcore.<name>`. ConfigError for an unknown field, one that is refused, a value of another type."""
    known = fields()
    if not known:
        raise ConfigError(f"{where}: megatron-core is not installed here: pip install 'megatron-core>=0.16.1,<0.17'")
    if name not in known:
        raise ConfigError(
            f"{where}: megatron-core's configurations have no field {name!r}{nearest(name, known, '--' + PREFIX)}"
        )
    reason = reason_against(name)
    if reason:
        raise ConfigError(f"{where}: {reason}")
    field = known[name]
    try:
        values = [_value(field, text) for text in texts]
    except ValueError:
        raise ConfigError(f"{where} {' '.join(texts)}: it takes {field.accepted}") from None
    if len(values) == 1:
        return values[0]
    if not values or not field.is_list or None in values:
        raise ConfigError(f"{where} {' '.join(texts) or 'nothing'}: it takes {field.accepted}")
    return [value for value in values if value is not None]


def spelled(value: Value) -> list[str]:
    """The texts that `parse` makes the value of."""
    return ["none" if item is None else str(item) for item in (value if isinstance(value, list) else [value])]


def _value(field: Field, text: str) -> bool | int | float | str | None:
    lowered = text.lower()
    if field.optional and lowered in NONE_SPELLINGS:
        return None
    if "bool" in field.kinds and lowered in ("true", "false"):
        return lowered == "true"
    if text in field.choices or "str" in field.kinds:
        return text
    for kind, make in (("int", int), ("float", float)):
        if kind in field.kinds:
            try:
                return make(text)
            except ValueError:
                continue
    raise ValueError(text)


def _annotations(class_name: str, file: str) -> Iterator[tuple[str, ast.expr]]:
    spec = importlib.util.find_spec("megatron")
    paths = [Path(root) / "core" / file for root in (spec.submodule_search_locations or ())] if spec else []
    path = next((path for path in paths if path.is_file()), None)
    tree = ast.parse(path.read_text(encoding="utf-8")) if path else ast.Module([], [])
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield line.target.id, line.annotation


def _field(name: str, annotation: ast.expr) -> Field:
    kinds: list[str] = []
    choices: list[str] = []
    flags = {"list": False, "optional": False}

    def visit(node: ast.expr) -> None:
        head = ast.unparse(node.value) if isinstance(node, ast.Subscript) else ast.unparse(node)
        inside = node.slice if isinstance(node, ast.Subscript) else None
        parts = inside.elts if isinstance(inside, ast.Tuple) else [inside] if inside is not None else []
        if head == "Literal":
            choices.extend(str(part.value) for part in parts if isinstance(part, ast.Constant))
            return
        flags["optional"] |= head == "Optional"
        flags["list"] |= head in ("list", "List", "Tuple")
        if head in _WORDS:
            kinds.append(head)
        for part in parts:
            visit(part)

    visit(annotation)
    return Field(name, tuple(dict.fromkeys(kinds)), tuple(choices), flags["list"], flags["optional"])
