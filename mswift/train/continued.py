"""An adapter that a run goes on with (--adapters) is trained as it is: flags that ask for another one are refused."""

from dataclasses import MISSING
from pathlib import Path
from typing import Any

from mswift.config.train import TrainConfig
from mswift.converters.adapters import EMBED, HEAD, expand_modules_to_save
from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError
from mswift.refusals.deepspeed import check_adapter_stage
from mswift.refusals.engine import check_four_bit_base
from mswift.train.trained import lora_config
from mswift.tuners.hidden import HIDDEN
from mswift.tuners.lora import LoraConfig, adapted
from mswift.tuners.method import parse_method
from mswift.tuners.methods import METHODS
from mswift.tuners.other_adapters import check_hidden, check_prompt
from mswift.tuners.peft_config import CONFIG_FILE, read_adapter_json, read_peft_config
from mswift.tuners.prompts import PROMPTS
from mswift.tuners.settings import PeftSettings
from mswift.tuners.shapes import promised_shapes


def check_continued(config: TrainConfig, table: ModelTable, path: Path, *, grows: bool) -> None:
    """ConfigError where the flags ask for another adapter than `path` is; grows: the model gets rows of new tokens."""
    if config.tuner_type in METHODS:
        return _check_method(config, table, path, grows=grows)
    if config.tuner_type in HIDDEN:
        return check_hidden(config, table, path)
    if config.tuner_type in PROMPTS:
        return check_prompt(config, table, path)
    if config.tuner_type == "xlora":
        return None  # `other_config` has read it
    settings = read_peft_config(path)
    LoraConfig(settings).check(f"{path}: ")
    promised_shapes(table, settings)
    check_adapter_stage(config, str(path), dora=settings.dora)
    if config.quant_method:
        check_four_bit_base(lora=True, dora=settings.dora, method=config.quant_method)
    own = {
        "lora_rank": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "lora_dropout": settings.dropout,
    }
    for name, there in own.items():
        if _is_given(config, name) and getattr(config, name) != there:
            raise _another(path, name, _shown(getattr(config, name)), _shown(there))
    _check_targets(config, table, path, settings)
    _check_modules(config, table, path, settings.modules_to_save, grows=grows)


def _check_targets(config: TrainConfig, table: ModelTable, path: Path, settings: PeftSettings) -> None:
    given = [name for name in ("target_modules", "target_parameters") if _is_given(config, name)]
    if not given:
        return
    wanted, there = lora_config(config, table), LoraConfig(settings)
    if adapted(wanted.own_table(table), wanted).keys() != adapted(there.own_table(table), there).keys():
        own = settings.target_modules, settings.target_parameters
        shown = " ".join(part if isinstance(part, str) else " ".join(part) for part in own if part)
        raise _another(path, given[0], " ".join(getattr(config, given[0])), shown, again=False)


def _check_modules(config: TrainConfig, table: ModelTable, path: Path, there: tuple[str, ...], *, grows: bool) -> None:
    """What is trained in full, rows of new tokens among it."""
    given = config.modules_to_save
    own = set(expand_modules_to_save(table, there))
    if given and set(expand_modules_to_save(table, given)) != own:
        raise _another(path, "modules_to_save", " ".join(given), " ".join(there) or "none", again=bool(there))
    if grows and not {EMBED, HEAD} <= own:
        raise ConfigError(
            f"--new_special_tokens {config.new_special_tokens[0]}: their rows would stay as they start, since the "
            f"adapter of --adapters {path} has no {EMBED} and {HEAD} (modules_to_save): fold it in first (mswift merge "
            f"--model {config.model} --adapters {path}), and start a new one on that"
        )


def _check_method(config: TrainConfig, table: ModelTable, path: Path, *, grows: bool) -> None:
    there, saved = parse_method(read_adapter_json(path), path / CONFIG_FILE)
    if there.method.name != config.tuner_type:
        raise ConfigError(
            f"--tuner_type {config.tuner_type}: --adapters {path} is {there.method.peft_type}: use --tuner_type "
            f"{there.method.name}"
        )
    there.shapes(table)
    for flag in ("tuner_config", "modules_to_save", "target_modules"):
        if _is_given(config, flag):
            raise ConfigError(f"--{flag} with --adapters {path}, which training continues as it is: leave it out")
    for flag, field in there.method.flags.items():
        if _is_given(config, flag) and getattr(config, flag) != there.fields[field]:
            raise _another(path, flag, _shown(getattr(config, flag)), _shown(there.fields[field]))
    _check_modules(config, table, path, saved, grows=grows)


def _another(path: Path, flag: str, given: str, there: str, *, again: bool = True) -> ConfigError:
    """again: the flag can say what is there."""
    remedy = f"use --{flag} {there}, or leave it out" if again else "leave it out"
    return ConfigError(
        f"--{flag} {given}: the adapter of --adapters {path} has {there}, and training continues it as it is: {remedy}"
    )


def _is_given(config: TrainConfig, name: str) -> bool:
    field = type(config).__dataclass_fields__[name]
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return bool(getattr(config, name) != default)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
