"""LoRA on a transformers model: PEFT's layers, with the names and first values that an adapter has on any engine."""

import json
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mswift.converters.adapters import expand_modules_to_save, saved_shapes, trained_name
from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError
from mswift.parallel.fsdp.dropout import CountedDropout
from mswift.parallel.fsdp.lora_start import MARK, add_starts, stored_start
from mswift.parallel.fsdp.pieces import Mapped, whole
from mswift.tuners.init import kaiming_uniform
from mswift.tuners.inject import NAME
from mswift.tuners.lora import Adapted, LoraConfig, adapted
from mswift.tuners.peft_config import CONFIG_FILE, adapter_files

_MATRICES = ("lora_A", "lora_B", "lora_magnitude_vector")


def check_lora(config: LoraConfig) -> None:
    """ConfigError for adapters that this engine does not train."""
    settings = config.settings
    if settings.target_parameters:
        raise ConfigError(
            f"--target_parameters {' '.join(settings.target_parameters)} (experts, routers) with --backend fsdp is not "
            "computed yet: use --backend megatron"
        )


def add_lora(model: nn.Module, table: ModelTable, config: LoraConfig, modules_to_save: tuple[str, ...]) -> None:
    """Freeze the base and let PEFT put its layers into it; the model may be without memory."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    check_lora(config)
    probability = config.settings.dropout
    plain = replace(config.settings, init="true")  # what starts as a part of the weight is filled when it is there
    content = json.loads(adapter_files(table, plain, (), None)[CONFIG_FILE]) | {"inference_mode": False}
    model.requires_grad_(False)
    inject_adapter_in_model(PeftLoraConfig(**content), model, adapter_name=NAME, low_cpu_mem_usage=True)
    for name, module in model.named_modules():
        if probability and hasattr(module, "lora_dropout"):
            module.lora_dropout[NAME] = CountedDropout(name, probability)
    if config.settings.init != "true":
        add_starts(model, next(model.parameters()).dtype)
    parameters = dict(model.named_parameters())
    for name in saved_shapes(table, expand_modules_to_save(table, modules_to_save)):
        parameters[trained_name(table, name)].requires_grad_(True)


def base_name(name: str) -> str | None:
    """The name of a parameter in the model before PEFT changed it; None for one of an adapter's."""
    if MARK in name or any(f".{matrix}.{NAME}." in name for matrix in _MATRICES):
        return None
    return name.replace(".base_layer.", ".")


def map_adapters(model: nn.Module, table: ModelTable, config: LoraConfig | None) -> dict[str, Mapped]:
    """What a checkpoint of an adapter run holds, by parameter name: keys `adapter.<PEFT name>`."""
    if config is None:
        return {}
    found = {}
    for name, parameter in model.named_parameters():
        if MARK in name:
            stored = stored_start(name)
            found[name] = whole(stored, f"adapter.{stored}", tuple(parameter.shape))
        if not parameter.requires_grad:
            continue
        stored = name.replace(f".{NAME}.", ".") if base_name(name) is None else name
        stored = stored.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
        found[name] = whole(stored, f"adapter.{stored}", tuple(parameter.shape))
    return found


def first_values(name: str, adapter: Adapted, weight: Tensor, first: int, count: int, seed: int) -> Tensor:
    """Rows `first` .. of a fresh tensor of an adapter, by PEFT's name. weight: the same rows of the adapted linear's.

    B is zero, magnitudes are the lengths of the weight's rows.
    """
    if name == adapter.name_a:
        return torch.from_numpy(kaiming_uniform(seed, name, count, adapter.in_features, first))
    if name == adapter.name_b:
        return torch.zeros(count, adapter.rank)
    assert name == adapter.name_magnitude
    return torch.linalg.vector_norm(weight.float(), dim=1)


def adapters_of(table: ModelTable, config: LoraConfig) -> Mapping[str, Adapted]:
    """PEFT's name of each tensor of the adapters -> its adapter."""
    own = adapted(config.own_table(table), config).values()
    return {name: each for each in own for name in (each.name_a, each.name_b, each.name_magnitude)}
