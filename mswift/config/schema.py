"""What a configuration dataclass accepts: its options by name and alias, as the flags and the recipes see them."""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

NONE_SPELLINGS = ("none", "null")
FOR_OTHERS = "flags for others"
"""Metadata of the one field that takes the flags which the dataclass does not have, as they were given."""


@dataclass(frozen=True)
class Option:
    """One field: `kind` is its annotation without metadata, `required` means it has no default."""

    name: str
    kind: Any
    aliases: tuple[str, ...]
    positional: bool
    required: bool
    for_others: bool = False

    @property
    def alternatives(self) -> tuple[Any, ...]:
        """The members of a union, or the kind itself."""
        return get_args(self.kind) if get_origin(self.kind) in (Union, types.UnionType) else (self.kind,)

    @property
    def boolean(self) -> bool:
        """Whether a bare flag means true."""
        return bool in self.alternatives

    @property
    def optional(self) -> bool:
        """Whether it can be none."""
        return type(None) in self.alternatives

    @property
    def many(self) -> bool:
        """Whether it takes any number of values."""
        return any(get_origin(kind) is tuple for kind in self.alternatives)

    @property
    def holds_fields(self) -> bool:
        """Whether it is a mapping of fields, each a flag of its own: --mcore.FIELD."""
        return get_origin(self.kind) is Mapping

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it takes, where these are all."""
        return tuple(str(word) for kind in self.alternatives if get_origin(kind) is Literal for word in get_args(kind))

    @property
    def accepted(self) -> str:
        """What it takes, in words: "full or lora", "a whole number or none"."""
        words = [_WORDS.get(kind) or _choices(kind) for kind in self.alternatives if kind is not type(None)]
        return " or ".join([*words, "none"] if self.optional else words)


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _choices(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"{_WORDS.get(get_args(kind)[0]) or _choices(get_args(kind)[0])}, any number of times"
    return str(kind)


def options_of(config_class: type) -> dict[str, Option]:
    """Options of a configuration dataclass by field name, in the order of the fields."""
    hints = get_type_hints(config_class, include_extras=True)
    return {field.name: _option(field, hints[field.name]) for field in dataclasses.fields(config_class)}


def _option(field: "dataclasses.Field[Any]", hint: Any) -> Option:
    kind, metadata = (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())
    aliases = [alias for item in metadata for alias in getattr(item, "aliases", None) or ()]
    return Option(
        name=field.name,
        kind=kind,
        aliases=tuple(canonical(alias.lstrip("-")) for alias in aliases),
        positional=tyro.conf.Positional in metadata,
        for_others=FOR_OTHERS in metadata,
        required=field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
    )


def canonical(name: str) -> str:
    """`name` with underscores: lora-rank and lora_rank are the same option."""
    return name.replace("-", "_")


def find(options: Mapping[str, Option], name: str) -> Option | None:
    """The option with this name or alias, hyphens and underscores alike."""
    wanted = canonical(name)
    return options.get(wanted) or next((o for o in options.values() if wanted in o.aliases), None)


def names(options: Mapping[str, Option]) -> list[str]:
    """Every name and alias that is not positional."""
    own = [o for o in options.values() if not (o.positional or o.for_others)]
    return [name for o in own for name in (o.name, *o.aliases)]


def field_of(options: Mapping[str, Option], name: str) -> tuple[Option, str] | None:
    """The mapping and the field that a flag like mcore.bucket_size means."""
    owner, dot, field = name.partition(".")
    option = options.get(canonical(owner)) if dot else None
    return (option, canonical(field)) if option is not None and option.holds_fields else None


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The hint that ends an error line: "did you mean --x?" for the nearest name, else nothing."""
    close = difflib.get_close_matches(canonical(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
