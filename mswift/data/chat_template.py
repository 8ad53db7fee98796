"""`--chat_template`: another chat template than the tokenizer's own, from a file, or one of several by its name."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mswift.errors import ConfigError

if TYPE_CHECKING:
    from jinja2.ext import Extension
    from jinja2.nodes import Node
    from jinja2.parser import Parser

    from mswift.data.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
_FLAG = "--chat_template"
_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt", ".json")
_KEY = "chat_template"
_CONFIG_FILES = ("tokenizer_config.json", "processor_config.json")


def read_chat_template(value: str | None) -> str | None:
    """The template in the file `value`; None for a name (and for None).

    A .json file holds it as `chat_template`. ConfigError: no such file, no template in it, jinja that does not parse
    (with its line).
    """
    if value is None or not _is_path(value):
        return None
    path = Path(value)
    if path.is_dir():
        raise ConfigError(f"{_FLAG} {value} is a folder; name the file in it: {_FLAG} {path / TEMPLATE_FILE}")
    if not path.is_file():
        raise ConfigError(f"{_FLAG} {value}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_FLAG} {value} cannot be read as text: {error}") from None
    template = _from_json(text, value) if path.suffix == ".json" else text
    _check_jinja(template, value)
    return template


def use_chat_template(tokenizer: "Tokenizer", value: str | None, *, chosen_before: bool = False) -> None:
    """Give the tokenizer the template that --chat_template means; nothing for None.

    chosen_before: the tokenizer comes from a checkpoint of a run with this flag, so that of a name the template is the
    only one there. ConfigError as `read_chat_template`, and for a name that the tokenizer does not have.
    """
    if value is None:
        return
    template = read_chat_template(value)
    if template is not None:
        tokenizer.chat_template = template
        return
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if value not in own:
            there = ", ".join(sorted(own))
            raise ConfigError(f"{_FLAG} {value}: the tokenizer has no template of this name; it has {there}")
        tokenizer.chat_template = own[value]
    elif not (chosen_before and own):
        has = "one template, without a name" if own else "no template"
        raise ConfigError(
            f"{_FLAG} {value}: there is no such file, and the tokenizer of {tokenizer.name_or_path} has {has}; give "
            f"the path of a .jinja file, or of a tokenizer_config.json that holds a {_KEY}"
        )


def template_of_adapters(adapters: Sequence[Path]) -> Path | None:
    """The chat template that adapters were trained with, where one brings it; ConfigError where two bring different."""
    found = [path / TEMPLATE_FILE for path in adapters if (path / TEMPLATE_FILE).is_file()]
    for path in found[1:]:
        if path.read_bytes() != found[0].read_bytes():
            raise ConfigError(
                f"--adapters: {found[0]} and {path} are different chat templates; remove one of these files, so that "
                "the model gets the other"
            )
    return found[0] if found else None


def own_template(files: Mapping[str, bytes]) -> str | None:
    """The one chat template among the files beside a model, by name; None where there is none, or several."""
    if TEMPLATE_FILE in files:
        return files[TEMPLATE_FILE].decode()
    found = json.loads(files.get(_CONFIG_FILES[0], b"{}")).get(_KEY)
    return found if isinstance(found, str) else None


def with_chat_template(files: dict[str, bytes], template: str) -> dict[str, bytes]:
    """The files beside a model, by name, with this template and no other."""
    changed = {name: data for name, data in files.items() if name != "chat_template.json"}
    for name in _CONFIG_FILES:
        content = json.loads(changed[name]) if name in changed else {}
        if content.pop(_KEY, None) is not None:
            changed[name] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    return changed | {TEMPLATE_FILE: template.encode()}


def _is_path(value: str) -> bool:
    return Path(value).suffix in _SUFFIXES or "/" in value or Path(value).is_file()


def _from_json(text: str, value: str) -> str:
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{_FLAG} {value} is not JSON: {error}") from None
    found = content.get(_KEY) if isinstance(content, dict) else None
    if isinstance(found, list):
        names = [entry.get("name") for entry in found if isinstance(entry, dict)]
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
        if found is None:
            raise ConfigError(
                f"{_FLAG} {value} holds several templates ({', '.join(map(str, names))}) and none is `default`; put "
                "the one that is meant into a .jinja file"
            )
    if not isinstance(found, str):
        raise ConfigError(f"{_FLAG} {value} holds no `{_KEY}`; name a .jinja file, or a JSON file that has one")
    return found


def _check_jinja(template: str, value: str) -> None:
    """ConfigError for what cannot be a chat template: it does not parse, or never asks for the messages."""
    from jinja2 import Environment, TemplateSyntaxError

    environment = Environment(extensions=[_generation_tag(), "jinja2.ext.loopcontrols"])
    try:
        environment.parse(template)
    except TemplateSyntaxError as error:
        raise ConfigError(f"{_FLAG} {value} is no jinja template: line {error.lineno}: {error.message}") from None
    if "messages" not in template:
        raise ConfigError(f"{_FLAG} {value} is no chat template: it does not speak of `messages`")


def _generation_tag() -> "type[Extension]":
    """The tag {% generation %} ... {% endgeneration %}, as far as parsing goes."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  (the attribute that jinja2 reads)

        def parse(self, parser: "Parser") -> "Node | list[Node]":
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation
