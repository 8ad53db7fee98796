"""`--dataset mixture.yaml`: sources, each with its weight or its epochs.

    - path: code.jsonl        # as an item of --dataset; relative to this file
      weight: 0.7             # as in --dataset_weights
    - path: books:train#1000
      weight: 0.3

Or `epochs: 1.5` in place of every weight: each sample of that source once in a pass over the mixture, and half of them,
chosen by the seed, twice.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from mswift.config.loader import scalar_text
from mswift.config.schema import nearest
from mswift.data.sources import beside
from mswift.errors import ConfigError
from mswift.refusals.data import MIXTURE_SUFFIXES, holds_mixture

_KEYS = ("path", "weight", "epochs")


@dataclass(frozen=True)
class Mixture:
    """Items of --dataset, and how often the samples of each come: by weights, or by epochs, or once (neither)."""

    specs: tuple[str, ...]
    weights: tuple[float, ...] = ()
    epochs: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Source:
    spec: str
    line: int
    kind: str
    number: float


def read_mixture(dataset: Sequence[str], weights: Sequence[float] = ()) -> Mixture:
    """What --dataset and --dataset_weights mean. ConfigError names file, line and key of what is wrong."""
    if not holds_mixture(dataset):
        return Mixture(tuple(dataset), tuple(weights))
    if len(dataset) > 1:
        name = next(item for item in dataset if Path(item).suffix in MIXTURE_SUFFIXES)
        raise ConfigError(f"--dataset {' '.join(dataset)}: a mixture stands alone; put the other items into {name}")
    path = Path(dataset[0]).expanduser()
    sources = [_source(node, path) for node in _items(path)]
    first = sources[0]
    seen: dict[str, int] = {}
    for source in sources:
        where = f"{path}, line {source.line}"
        if source.kind != first.kind:
            raise ConfigError(f"{where}: {source.kind}, and line {first.line} has {first.kind}: give all one of them")
        name = os.path.normpath(source.spec)
        if name in seen:
            raise ConfigError(f"{where}: {source.spec} is in line {seen[name]} too; keep one, with the sum of both")
        seen[name] = source.line
    specs, numbers = tuple(source.spec for source in sources), tuple(source.number for source in sources)
    return Mixture(specs, weights=numbers) if first.kind == "weight" else Mixture(specs, epochs=numbers)


def _items(path: Path) -> list[yaml.Node]:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset {path}: it cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--dataset {path}: it is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        raise ConfigError(f"--dataset {path}: it must be a list of sources, as `- {{path: a.jsonl, weight: 0.7}}`")
    return list(root.value)


def _source(node: yaml.Node, file: Path) -> _Source:
    line = node.start_mark.line + 1
    where = f"{file}, line {line}"
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{where}: a source is a mapping, as `- {{path: a.jsonl, weight: 0.7}}`")
    values: dict[str, str] = {}
    for key, value in node.value:
        at = f"{file}, line {key.start_mark.line + 1}"
        if key.value not in _KEYS:
            raise ConfigError(f"{at}: unknown key {key.value}{nearest(str(key.value), _KEYS)}")
        if key.value in values:
            raise ConfigError(f"{at}: {key.value} is given twice; keep one")
        text = scalar_text(value)
        if not text:
            raise ConfigError(f"{at}: {key.value} must be one value")
        values[key.value] = text
        if key.value != "path":
            _number(text, f"{at}: {key.value}")
    kinds = [kind for kind in _KEYS[1:] if kind in values]
    if "path" not in values or len(kinds) != 1:
        raise ConfigError(f"{where}: a source has a path, and a weight or epochs (1: every sample once)")
    return _Source(beside(values["path"], file.parent), line, kinds[0], float(values[kinds[0]]))


def _number(text: str, where: str) -> None:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"{where} {text}: it must be a number above 0; or leave the source out")
