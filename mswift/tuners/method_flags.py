"""What the flags of a run mean as fields of a method's configuration. No torch."""

import json
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any

from mswift.config.train import TrainConfig
from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError
from mswift.tuners.method import MethodConfig
from mswift.tuners.methods import METHODS, Method

_RANKS = ("lora_rank", "lora_alpha", "lora_dropout")
_LORA_ALONE = (
    *("use_rslora", "use_dora", "init_weights", "lorap_lr_ratio", "quant_method", "quant_bits", "bnb_4bit_quant_type"),
    *("target_parameters", "init_batches", "lora_ga_direction", "lora_ga_scale", "lora_ga_stable_gamma"),
)


def method_config(config: TrainConfig, table: ModelTable, num_steps: int | None = None) -> MethodConfig:
    """The adapter of `config.tuner_type`, a method; num_steps: of the run, which AdaLoRA plans for.

    ConfigError for flags that the method does not take, and for fields and names that do not fit.
    """
    method = METHODS[config.tuner_type]
    fields = {**_from_flags(config, method), **tuner_fields(config)}
    if method.name == "adalora":
        fields = _with_schedule(config, {**method.fields, **fields}, num_steps)
    return MethodConfig.for_table(
        table, method.name, target_modules=config.target_modules, fields=fields, seed=config.seed
    )


def tuner_fields(config: TrainConfig) -> dict[str, Any]:
    """--tuner_config; ConfigError where it is no JSON object."""
    if config.tuner_config is None:
        return {}
    try:
        found = json.loads(config.tuner_config)
    except ValueError as error:
        raise ConfigError(f"--tuner_config {config.tuner_config}: no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--tuner_config {config.tuner_config}: a JSON object of fields, as '{{\"r\": 16}}'")
    return found


def _from_flags(config: TrainConfig, method: Method) -> dict[str, Any]:
    given = tuner_fields(config)
    for name in _given(config, (*_RANKS, *_LORA_ALONE)):
        value = getattr(config, name)
        shown = " ".join(value) if isinstance(value, tuple) else value
        if name in _LORA_ALONE:
            raise ConfigError(f"--{name} {shown} has no effect with --tuner_type {method.name}: use --tuner_type lora")
        if name not in method.flags:
            raise ConfigError(
                f"--{name} {shown} has no effect with --tuner_type {method.name}: --tuner_config takes "
                f"{' '.join(method.fields)}"
            )
        field = method.flags[name]
        if field in given and given[field] != value:
            raise ConfigError(f"--{name} {shown} and {field} {given[field]} of --tuner_config: leave one of them out")
    return {field: getattr(config, flag) for flag, field in method.flags.items()}


def _given(config: TrainConfig, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        field = type(config).__dataclass_fields__[name]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if getattr(config, name) != default:
            yield name


def _with_schedule(config: TrainConfig, fields: dict[str, Any], num_steps: int | None) -> dict[str, Any]:
    """AdaLoRA's with total_step: the length of the run, unless it is given."""
    total = fields["total_step"] or config.train_iters or num_steps or 0
    if total and fields["tinit"] >= total - fields["tfinal"]:
        raise ConfigError(
            f"--tuner_config: AdaLoRA takes ranks away between step tinit = {fields['tinit']} and step total_step - "
            f"tfinal = {total} - {fields['tfinal']}: that is no step; lower tinit and tfinal"
        )
    return fields | {"total_step": total}
