"""Adapters beside LoRA: PEFT's methods, its prompts, X-LoRA, tuners of hidden states; told apart by name or file.

No torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mswift.config.train import TrainConfig
from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError
from mswift.tuners.hidden import HIDDEN, HiddenConfig, hidden_config, is_hidden, parse_hidden
from mswift.tuners.method import MethodConfig, parse_method
from mswift.tuners.method_flags import method_config, tuner_fields
from mswift.tuners.peft_config import CONFIG_FILE, read_adapter_json
from mswift.tuners.prompt_config import check_continued, parse_prompt, prompt_config
from mswift.tuners.prompts import PROMPTS, PromptConfig, is_prompt
from mswift.tuners.xlora import XloraConfig, check_choice, check_fits, xlora_config
from mswift.tuners.xlora_files import is_xlora, parse_xlora

OtherConfig = MethodConfig | HiddenConfig | PromptConfig | XloraConfig


def other_config(config: TrainConfig, table: ModelTable, num_steps: int | None = None) -> OtherConfig:
    """The adapter of `config.tuner_type`, which is no LoRA; num_steps: of the run. ConfigError if it does not fit."""
    if config.tuner_type == "xlora":
        if config.adapters:
            return _mixed(config, table, Path(config.adapters[0]))
        made = xlora_config(table, tuner_fields(config), config.xlora_adapters, config.seed)
        check_choice(made, config.xlora_adapters)
        return made
    if config.tuner_type in PROMPTS:
        return prompt_config(table, config.tuner_type, tuner_fields(config), config.seed)
    return _hidden(config, table) if config.tuner_type in HIDDEN else method_config(config, table, num_steps)


def _hidden(config: TrainConfig, table: ModelTable) -> HiddenConfig:
    if config.tuner_type == "adapter":
        return hidden_config(table, "adapter", config.adapter_length, (), config.adapter_act, config.seed)
    return hidden_config(table, "reft", config.reft_rank, config.reft_layers, seed=config.seed)


def _mixed(config: TrainConfig, table: ModelTable, adapter: Path) -> XloraConfig:
    """The X-LoRA of --adapters, which a run goes on with as it is; ConfigError if it cannot."""
    data = read_adapter_json(adapter)
    if not is_xlora(data):
        raise ConfigError(
            f"--tuner_type xlora: --adapters {adapter} is {data.get('peft_type')}: it is for an X-LoRA to go on with; "
            "name the LoRAs to mix by --xlora_adapters"
        )
    for name in ("tuner_config", "xlora_adapters"):
        if getattr(config, name):
            raise ConfigError(f"--{name} with --adapters {adapter}, which training continues as it is: leave one out")
    made = parse_xlora(data, adapter / CONFIG_FILE, config.seed)
    check_fits(made, table, adapter)
    return made


def parse_other(
    data: Mapping[str, Any], path: Path, num_layers: int, seed: int = 0
) -> tuple[OtherConfig, tuple[str, ...]]:
    """(adapter, modules_to_save) of the content of an adapter_config.json; num_layers: of the model."""
    if is_hidden(data):
        return parse_hidden(data, path, num_layers, seed), ()
    if is_prompt(data):
        return parse_prompt(data, path, num_layers, seed), ()
    if is_xlora(data):
        return parse_xlora(data, path, seed), ()
    return parse_method(data, path, seed)


def check_hidden(config: TrainConfig, table: ModelTable, adapter: Path) -> None:
    """ConfigError unless the flags mean the adapter that a run with --adapters is to continue."""
    data = read_adapter_json(adapter)
    if data.get("peft_type", "LORA") != config.tuner_type.upper():
        raise ConfigError(
            f"--tuner_type {config.tuner_type}: --adapters {adapter} is {data.get('peft_type')}: use --tuner_type "
            f"{str(data.get('peft_type')).lower()}"
        )
    there = parse_hidden(data, adapter / CONFIG_FILE, table.spec.num_layers).content(None)
    for name, value in _hidden(config, table).content(None).items():
        if there[name] != value:
            raise ConfigError(
                f"--{name} {value}: the adapter of --adapters {adapter} has {there[name]}, and training continues it "
                f"as it is: use --{name} {there[name]}"
            )


def check_prompt(config: TrainConfig, table: ModelTable, adapter: Path) -> None:
    """ConfigError unless a run of prompt learning can go on with the adapter of --adapters."""
    data = read_adapter_json(adapter)
    given = prompt_config(table, config.tuner_type, tuner_fields(config))
    if not is_prompt(data):
        raise ConfigError(
            f"--tuner_type {config.tuner_type}: --adapters {adapter} is {data.get('peft_type')}: give one of the same "
            "kind"
        )
    if config.tuner_config is not None:
        raise ConfigError(f"--tuner_config with --adapters {adapter}, which training continues as it is: leave it out")
    check_continued(given, parse_prompt(data, adapter / CONFIG_FILE, table.spec.num_layers), adapter)
