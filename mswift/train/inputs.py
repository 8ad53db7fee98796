"""What a launch and a dry run check alike before torch is imported: module names, adapter, dtype, files."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from mswift.config.train import TrainConfig
from mswift.converters.plan import ModelTable
from mswift.data.sources import parse_source
from mswift.errors import ConfigError, MswiftError
from mswift.refusals import train_dtype
from mswift.train.memory import trained_parameters
from mswift.train.resume import start_of
from mswift.tuners.peft_config import read_peft_config
from mswift.tuners.shapes import promised_shapes


def input_refusals(config: TrainConfig, table: ModelTable, stored_dtype: str) -> list[MswiftError]:
    """Every reason not to start that the model's table and the directories tell. `stored_dtype`: as "BF16"."""
    checks: list[Callable[[], object]] = [
        lambda: train_dtype(config, stored_dtype),
        lambda: trained_parameters(config, table),
        *(partial(_check_adapter, config, table, Path(path)) for path in config.adapters),
        *(partial(parse_source, spec, "--dataset") for spec in config.dataset),
        *(partial(parse_source, spec, "--val_dataset") for spec in config.val_dataset),
        lambda: start_of(config),
    ]
    refusals = []
    for check in checks:
        try:
            check()
        except MswiftError as error:
            refusals.append(error)
    return refusals


def _check_adapter(config: TrainConfig, table: ModelTable, path: Path) -> None:
    """An adapter to continue keeps its own rank and scale: ConfigError where the flags ask for others."""
    settings = read_peft_config(path)
    settings.require_plain("training")
    promised_shapes(table, settings)
    for name, own in (("lora_rank", settings.rank), ("lora_alpha", settings.alpha)):
        value = getattr(config, name)
        if value not in (own, type(config).__dataclass_fields__[name].default):
            raise ConfigError(
                f"--{name} {value:g}: the adapter of --adapters {path} has {own:g}, and training continues it as it "
                f"is: use --{name} {own:g}, or leave it out"
            )
