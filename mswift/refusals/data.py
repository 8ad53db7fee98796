"""What of the data flags does not fit together."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from mswift.config.blend import parse_blend
from mswift.config.train import TrainConfig
from mswift.errors import ConfigError

MIXTURE_SUFFIXES = (".yaml", ".yml")


def data_path_refusals(config: TrainConfig, data_path: tuple[str, ...]) -> Iterator[ConfigError]:
    """Its documents are tokens already: there are no rows to choose, to name or to set apart."""
    given = f"--data_path {' '.join(data_path)}"
    if config.dataset:
        yield ConfigError(f"--dataset {' '.join(config.dataset)} and {given}: give one of them")
    if config.dataset_weights:
        yield ConfigError(
            "--dataset_weights is for --dataset; weights of --data_path stand before each prefix: 0.3 a 0.7 b"
        )
    if config.columns:
        yield ConfigError(f"--columns is for rows, {given} has none: leave it out")
    if config.split_dataset_ratio:
        yield ConfigError(
            f"--split_dataset_ratio {config.split_dataset_ratio:g} sets rows of --dataset apart, {given} has none: "
            "name text files with --val_dataset"
        )
    try:
        parse_blend(data_path)
    except ConfigError as error:
        yield error


def data_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    """Of weights, parts that are set apart, columns."""
    weights, ratio = config.dataset_weights, config.split_dataset_ratio
    if weights and holds_mixture(config.dataset):
        yield ConfigError(
            f"--dataset_weights: --dataset {config.dataset[0]} has the weights of its sources; leave the flag out"
        )
    elif weights and len(weights) != len(config.dataset):
        yield ConfigError(
            f"--dataset_weights has {len(weights)} numbers for {len(config.dataset)} items of --dataset: give one each"
        )
    for weight in weights:
        if not 0 < weight < math.inf:
            yield ConfigError(
                f"--dataset_weights {weight:g}: a weight must be above 0; leave the item of --dataset out"
            )
    if not 0 <= ratio < 1:
        yield ConfigError(f"--split_dataset_ratio {ratio:g} must be from 0 to below 1: 0.01 sets apart one row in 100")
    if ratio and config.val_dataset:
        yield ConfigError(f"--split_dataset_ratio {ratio:g} and --val_dataset: give one of them")
    if config.eval_steps is not None and not config.val_dataset and not ratio:
        yield ConfigError(
            f"--eval_steps {config.eval_steps} has nothing to evaluate: add --val_dataset FILE or "
            "--split_dataset_ratio 0.01, or leave it out"
        )
    try:
        parse_columns(config.columns)
    except ConfigError as error:
        yield error


def holds_mixture(dataset: Sequence[str]) -> bool:
    """Whether an item of --dataset is a YAML file of sources (see `mswift.data.mixture`)."""
    return any(Path(item).suffix in MIXTURE_SUFFIXES for item in dataset)


def parse_columns(text: str | None) -> tuple[tuple[str, str], ...]:
    """--columns as (name in the file, name that is meant); ConfigError for anything but a JSON object of names."""
    if text is None:
        return ()
    try:
        value = json.loads(text)
    except ValueError as error:
        value = error
    if not (isinstance(value, dict) and value and all(isinstance(name, str) and name for name in value.values())):
        raise ConfigError(
            f'--columns {text}: it takes a JSON object of names: --columns \'{{"my_question": "query"}}\''
        )
    if len(set(value.values())) < len(value):
        raise ConfigError(f"--columns {text}: two columns cannot have one name; rename one of them")
    return tuple(value.items())
