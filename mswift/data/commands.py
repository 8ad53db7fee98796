"""`mswift data show|build|info`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mswift import rundir
from mswift.config.data import DataConfig
from mswift.data import show
from mswift.data.cache import INDEX, open_store
from mswift.data.chat_template import use_chat_template
from mswift.data.dataset import TokenDataset, build_dataset
from mswift.data.flags import data_options
from mswift.data.info import describe
from mswift.data.mixture import read_mixture
from mswift.data.selection import Selection
from mswift.data.tokenizer import load_tokenizer
from mswift.errors import ConfigError, DataError


def main(config: DataConfig) -> int:
    """Run the action; returns the exit status."""
    entries = [Path(spec) for spec in config.dataset if (Path(spec) / INDEX).is_file()]
    if config.action == "info" and entries:
        if len(entries) < len(config.dataset):
            raise ConfigError("--dataset: name entries of the token cache, or data sets, not both")
        for entry in entries:
            _print_entry(entry)
        return 0
    if config.model is None:
        raise ConfigError(f"data {config.action} needs --model: its tokenizer and chat template decide the tokens")
    if config.max_length < 2:
        raise ConfigError(f"--max_length {config.max_length}: a sample needs at least 2 tokens, --max_length 2048")
    if config.dataset_num_proc is not None and config.dataset_num_proc < 1:
        raise ConfigError(f"--dataset_num_proc {config.dataset_num_proc}: at least 1; leave it out for the default")
    model = Path(config.model)
    files = model / rundir.HF_FILES if (model / rundir.HF_FILES).is_dir() else model
    if config.action == "show":
        return show.main(config, files)
    for name, data in _datasets(config, files):
        print(f"{name}: {data.entry}\n{data.summary}")
        if config.action == "info":
            _print_entry(data.entry)
    return 0


def _datasets(config: DataConfig, files: Path) -> Iterator[tuple[str, TokenDataset]]:
    """What a run reads: --dataset, and what it is evaluated on. Tokenised unless the cache has it."""
    if config.split_dataset_ratio and config.val_dataset:
        raise ConfigError("--split_dataset_ratio and --val_dataset both name what to evaluate on; give one of them")
    if not 0 <= config.split_dataset_ratio < 1:
        raise ConfigError(f"--split_dataset_ratio {config.split_dataset_ratio:g}: at least 0 and below 1, as 0.01")
    tokenizer = load_tokenizer(files)
    use_chat_template(tokenizer, config.chat_template)
    options = data_options(config.kind, config)
    apart = replace(options, selection=replace(options.selection, part="validation"))
    whole = replace(options, selection=Selection())
    specs_of_dataset = read_mixture(config.dataset).specs
    for flag, specs, chosen, wanted in (
        ("--dataset", specs_of_dataset, options, True),
        ("--dataset", specs_of_dataset, apart, bool(config.split_dataset_ratio)),
        ("--val_dataset", config.val_dataset, whole, bool(config.val_dataset)),
    ):
        if wanted:
            data = build_dataset(
                config.kind, specs, tokenizer, chosen, is_writer=True, barrier=lambda: None, progress=True, flag=flag
            )
            yield "validation" if chosen is not options else "training", data


def _print_entry(entry: Path) -> None:
    try:
        store = open_store(entry)
    except DataError as error:
        raise DataError(f"{entry}: {error}; `mswift data build` builds it again") from None
    print("\n".join(describe(store)))
