"""What a launch and a dry run check alike before torch is imported: module names, adapter, dtype, files."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from mswift.config.train import TrainConfig
from mswift.converters.plan import ModelTable
from mswift.data.formats import parse_spec
from mswift.errors import ConfigError, MswiftError
from mswift.refusals import train_dtype
from mswift.train.memory import trained_parameters
from mswift.train.resume import start_of
from mswift.tuners.lora import LoraConfig
from mswift.tuners.peft_config import read_peft_config
from mswift.tuners.shapes import promised_shapes


def input_refusals(config: TrainConfig, table: ModelTable, stored_dtype: str) -> list[MswiftError]:
    """Every reason not to start that the model's table and the directories tell. `stored_dtype`: as "BF16"."""
    checks: list[Callable[[], object]] = [
        lambda: train_dtype(config, stored_dtype),
        lambda: trained_parameters(config, table),
        *(partial(_check_adapter, config, table, Path(path)) for path in config.adapters),
        *(partial(parse_spec, spec, "--dataset") for spec in config.dataset),
        *(partial(parse_spec, spec, "--val_dataset") for spec in config.val_dataset),
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
    LoraConfig(settings).check(f"{path}: ")
    promised_shapes(table, settings)
    own = {
        "lora_rank": settings.rank,
        "lora_alpha": f"{settings.alpha:g}",
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
    }
    for name, there in own.items():
        value = getattr(config, name)
        given = f"{value:g}" if isinstance(value, float) else value
        if str(given) != str(there) and value != type(config).__dataclass_fields__[name].default:
            raise ConfigError(
                f"--{name} {given}: the adapter of --adapters {path} has {there}, and training continues it as it "
                f"is: use --{name} {there}, or leave it out"
            )
