"""LoRA on a transformers model: PEFT's layers, with the names and first values that an adapter has on any engine."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mswift.converters.adapters import SAVABLE, expand_modules_to_save, trained_name
from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError
from mswift.parallel.fsdp.pieces import Mapped, whole
from mswift.tuners.init import kaiming_uniform
from mswift.tuners.lora import Adapted, LoraConfig, adapted
from mswift.tuners.peft_config import CONFIG_FILE, adapter_files

_NAME = "default"  # under which PEFT keeps an adapter
_MATRICES = {"lora_A": "lora_A", "lora_B": "lora_B"}


def check_lora(config: LoraConfig) -> None:
    """ConfigError for adapters that this engine does not train."""
    settings = config.settings
    for flag, is_on in {
        "use_dora": settings.dora,
        "lora_dropout": settings.dropout > 0,
        f"init_weights {settings.init}": settings.init != "true",
        "target_parameters": bool(settings.target_parameters),
    }.items():
        if is_on:
            raise ConfigError(f"--{flag} with --backend fsdp is not computed yet: use --backend megatron")


def add_lora(model: nn.Module, table: ModelTable, config: LoraConfig, modules_to_save: tuple[str, ...]) -> None:
    """Freeze the base and let PEFT put its layers into it; the model may be without memory."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    check_lora(config)
    content = json.loads(adapter_files(table, config.settings, (), None)[CONFIG_FILE]) | {"inference_mode": False}
    model.requires_grad_(False)
    inject_adapter_in_model(PeftLoraConfig(**content), model, adapter_name=_NAME, low_cpu_mem_usage=True)
    parameters = dict(model.named_parameters())
    for leaf in expand_modules_to_save(table, modules_to_save):
        parameters[trained_name(table, SAVABLE[leaf])].requires_grad_(True)


def base_name(name: str) -> str | None:
    """The name of a parameter in the model before PEFT changed it; None for one of an adapter's."""
    if any(f".{matrix}.{_NAME}." in name for matrix in _MATRICES):
        return None
    return name.replace(".base_layer.", ".")


def map_adapters(model: nn.Module, table: ModelTable, config: LoraConfig | None) -> dict[str, Mapped]:
    """What is trained of an adapter run, by parameter name: keys `adapter.<PEFT name>`."""
    if config is None:
        return {}
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        stored = name.replace(f".{_NAME}.", ".") if base_name(name) is None else name
        found[name] = whole(stored, f"adapter.{stored}", tuple(parameter.shape))
    return found


def first_values(name: str, table: ModelTable, config: LoraConfig, first: int, count: int) -> Tensor | None:
    """Rows of a fresh A, by PEFT's name; of a fresh B None: zeros. KeyError for a module in full."""
    own: Mapping[str, Adapted] = adapted(config.own_table(table), config)
    for adapter in own.values():
        if name == adapter.name_b:
            return None
        if name == adapter.name_a:
            start = kaiming_uniform(config.seed, name, count, adapter.in_features, first)
            return torch.from_numpy(start)
    raise KeyError(name)
