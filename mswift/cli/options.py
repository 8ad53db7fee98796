"""Command line and recipe -> one frozen configuration; every mistake is one line that names the flag.

The recipe and the flags both become name -> texts; flags win over the recipe and later flags over earlier ones.
tyro turns the texts into typed values and writes the help from the field docstrings.
"""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import TypeVar, get_type_hints

import tyro

from mswift.config import mcore
from mswift.config.elsewhere import flag_hint, value_hint
from mswift.config.loader import read_recipe
from mswift.config.schema import NONE_SPELLINGS, Option, canonical, field_of, find, names, nearest, options_of
from mswift.config.train import PtConfig, SftConfig
from mswift.errors import ConfigError

ConfigT = TypeVar("ConfigT")
TRAINING = (PtConfig, SftConfig)

_FLAG = re.compile(r"--[A-Za-z]")
_RECIPE_SUFFIXES = (".yaml", ".yml")
_MARKERS = (tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes)


def wants_help(argv: Sequence[str]) -> bool:
    """Whether help is asked for."""
    return "-h" in argv or "--help" in argv


def print_help(config_class: type, command: str, description: str) -> None:
    """Print the options of a command with their docstrings."""
    options = options_of(config_class)
    positional = any(option.positional for option in options.values())
    for option in options.values():
        if option.holds_fields:
            description += f" --{option.name}.FIELD VALUE sets a field of megatron-core's own configurations."
    usage = f"mswift {command}" if positional else f"mswift {command} [RECIPE.yaml]"
    try:
        tyro.cli(
            config_class,
            args=["--help"],
            prog=usage,
            description=description,
            config=_MARKERS,
            use_underscores=True,
        )
    except SystemExit:
        return


def parse(config_class: type[ConfigT], argv: Sequence[str]) -> ConfigT:
    """The configuration that `argv` (after the command) asks for. ConfigError in one line."""
    options = options_of(config_class)
    positionals, flags = _split(options, argv)
    fields = [option for option in options.values() if option.positional]
    values: dict[str, list[str]] = {}
    if fields:
        values.update(_positional_values(fields, positionals))
    elif positionals:
        recipe, *surplus = positionals
        if not Path(recipe).is_file():
            if Path(recipe).suffix in _RECIPE_SUFFIXES:
                raise ConfigError(f"there is no recipe {recipe!r}")
            raise ConfigError(f"{recipe!r} is neither a recipe file nor a --flag{_flag_hint(options, recipe)}")
        if surplus:
            raise ConfigError(f"unexpected {surplus[0]!r} beside the recipe {recipe}; values follow a --flag")
        values.update(read_recipe(Path(recipe), config_class))
    values.update(flags)
    fields_given = {name: values.pop(name) for name in list(values) if field_of(options, name)}
    others = {o.name: tuple(values.pop(o.name, ())) for o in options.values() if o.for_others}
    missing = [option for option in options.values() if option.required and not values.get(option.name)]
    if missing:
        raise ConfigError(f"--{missing[0].name} is required ({missing[0].accepted}); --help says what it is")
    config = _typed(config_class, options, values)
    if others:
        config = replace(config, **others)  # type: ignore[type-var]
    return _with_fields(config, options, fields_given) if fields_given else config


def _with_fields(config: ConfigT, options: Mapping[str, Option], given: Mapping[str, list[str]]) -> ConfigT:
    """`config` with the fields of its mapping (mcore.FIELD -> texts)."""
    fields = {}
    for name, texts in given.items():
        found = field_of(options, name)
        assert found is not None
        option, field = found
        fields[field] = mcore.parse(field, texts, f"--{option.name}.{field}")
    return replace(config, **{option.name: fields})  # type: ignore[type-var]


def _positional_values(fields: Sequence[Option], given: Sequence[str]) -> dict[str, list[str]]:
    spelled = " ".join(o.name.upper() if o.required else f"[{o.name.upper()}]" for o in fields)
    needed = sum(option.required for option in fields)
    if not needed <= len(given) <= len(fields):
        count = str(needed) if needed == len(fields) else f"{needed} to {len(fields)}"
        takes = "".join(f"; {option.name.upper()} is {option.accepted}" for option in fields if option.choices)
        are = "argument is" if count == "1" else "arguments are"
        raise ConfigError(f"{count} {are} needed ({spelled}), {len(given)} given{takes}")
    return {option.name: [value] for option, value in zip(fields, given, strict=False)}


def _split(options: Mapping[str, Option], argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Arguments that belong to no flag, and the texts of each flag that is given; of a repeated flag the last."""
    positionals: list[str] = []
    flags: dict[str, list[str]] = {}
    spellings: dict[str, str] = {}
    for_others = next((option.name for option in options.values() if option.for_others), None)
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not _FLAG.match(argument):
            positionals.append(argument)
            continue
        spelled, equals, attached = argument.partition("=")
        if found := field_of(options, spelled[2:]):
            flags[f"{found[0].name}.{found[1]}"] = _take_field(found[1], [attached] if equals else [], rest)
            continue
        option = find(options, spelled[2:])
        if option is None and for_others is not None:
            flags.setdefault(for_others, []).extend([argument, *_until_flag(rest)])
            continue
        if option is None or option.positional or option.for_others:
            raise ConfigError(f"unknown flag {spelled}{_flag_hint(options, spelled[2:])}")
        if option.holds_fields:
            raise ConfigError(f"{spelled} takes one field a flag: {spelled}.FIELD VALUE")
        if canonical(spellings.setdefault(option.name, spelled)) != canonical(spelled):
            raise ConfigError(f"{spellings[option.name]} and {spelled} are the same option; give one of them")
        if not equals:
            flags[option.name] = _take(option, spelled, rest)
        else:
            flags[option.name] = [attached, *(_take(option, spelled, rest) if option.many else [])]
    return positionals, flags


def _until_flag(rest: list[str]) -> list[str]:
    """Remove what stands before the next flag from the front of `rest`."""
    taken: list[str] = []
    while rest and not _FLAG.match(rest[0]):
        taken.append(rest.pop(0))
    return taken


def _take(option: Option, spelled: str, rest: list[str]) -> list[str]:
    """Remove the texts of a flag from the front of `rest`."""
    if option.boolean:
        if not rest or _FLAG.match(rest[0]) or Path(rest[0]).suffix in _RECIPE_SUFFIXES:
            return ["true"]
        if rest[0].lower() in ("true", "false") or (option.optional and rest[0].lower() in NONE_SPELLINGS):
            return [rest.pop(0)]
        raise ConfigError(f"{spelled} {rest[0]}: it takes {option.accepted}; the bare flag means true")
    taken: list[str] = []
    while rest and not _FLAG.match(rest[0]) and (option.many or not taken):
        taken.append(rest.pop(0))
    if not taken and not option.many:
        raise ConfigError(f"{spelled} needs a value; it takes {option.accepted}")
    return taken


def _take_field(field: str, taken: list[str], rest: list[str]) -> list[str]:
    """The texts of a field of megatron-core, removed from the front of `rest`; a bare flag is true."""
    known = mcore.fields().get(field)
    many = known is not None and known.is_list
    while rest and not _FLAG.match(rest[0]) and (many or not taken) and Path(rest[0]).suffix not in _RECIPE_SUFFIXES:
        taken.append(rest.pop(0))
    return taken or ["true"]


def _flag_hint(options: Mapping[str, Option], name: str) -> str:
    known = names(options)
    return flag_hint(canonical(name), known) or _of_its_sibling(options, name) or nearest(name, known, "--")


def _of_its_sibling(options: Mapping[str, Option], name: str) -> str:
    """The hint about a flag that the other command of training has."""
    commands = {kind.command: options_of(kind) for kind in TRAINING}
    if options not in commands.values() or find(options, name) is not None:
        return ""
    others = [command for command, its in commands.items() if find(its, name) is not None]
    return f"; mswift {others[0]} has it" if others else ""


def _typed(config_class: type[ConfigT], options: Mapping[str, Option], values: Mapping[str, list[str]]) -> ConfigT:
    config = _run_tyro(config_class, options, values)
    if config is not None:
        return config
    hints = get_type_hints(config_class, include_extras=True)
    for name, texts in values.items():
        alone = make_dataclass("Alone", [(name, hints[name])])
        if _run_tyro(alone, options, {name: texts}) is None:
            given, option = " ".join(texts), options[name]
            hint = value_hint(name, given, names(options)) or nearest(given, option.choices)
            said = name.upper() if option.positional else f"--{name}"
            raise ConfigError(f"{said} {given or 'nothing'}: it takes {option.accepted}{hint}")
    raise ConfigError("the options do not fit together")


def _run_tyro(
    config_class: type[ConfigT], options: Mapping[str, Option], values: Mapping[str, list[str]]
) -> ConfigT | None:
    """The typed configuration, or None when tyro refuses a value."""
    arguments: list[str] = []
    for name, texts in values.items():
        option = options[name]
        spelled = [_spelling(option, text) for text in texts]
        if option.positional or (len(spelled) != 1 and not option.many):
            arguments += spelled if option.positional else [f"--{name}", *spelled]
        else:
            arguments += [f"--{name}", *spelled] if option.many else [f"--{name}={spelled[0]}"]
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return tyro.cli(config_class, args=arguments, config=_MARKERS, use_underscores=True, console_outputs=False)
    except SystemExit:
        return None


def _spelling(option: Option, text: str) -> str:
    """`text` as tyro spells it: True, False and None have a capital."""
    lowered = text.lower()
    if option.boolean and lowered in ("true", "false"):
        return lowered.capitalize()
    return "None" if option.optional and lowered in NONE_SPELLINGS else text
