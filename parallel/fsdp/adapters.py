"""LoRA on a transformers model: PEFT's layers, with the names and first values that an adapter has on any engine."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mswift.converters.adapters import expand_modules_to_save, saved_shapes, trained_name
from mswift.converters.layout import Dim, Piece
from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError
from mswift.parallel.fsdp.dropout import CountedDropout
from mswift.parallel.fsdp.lora_start import MARK, add_starts, stored_start
from mswift.parallel.mapped import Mapped, whole
from mswift.tuners.init import kaiming_uniform
from mswift.tuners.inject import NAME
from mswift.tuners.lora import Adapted, LoraConfig, adapted
from mswift.tuners.peft_config import CONFIG_FILE, adapter_files

_WRAPPED = re.compile(r"(\.base_layer)+\.")  # a module with several parameters of its own has a wrapper for each
_MATRICES = ("lora_A", "lora_B", "lora_magnitude_vector")


def check_lora(config: LoraConfig) -> None:
    """ConfigError for adapters that this engine does not train."""
    if config.per_expert:
        raise ConfigError(
            f"{config.settings.path}: has a LoRA for the linear of every expert, as transformers 4 had them; "
            "transformers 5 stacks the experts: use --backend megatron"
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
    if config.settings.starts_in_weight:
        add_starts(model, next(model.parameters()).dtype)
    parameters = dict(model.named_parameters())
    for name in saved_shapes(table, expand_modules_to_save(table, modules_to_save)):
        parameters[trained_name(table, name)].requires_grad_(True)


def base_name(name: str) -> str | None:
    """The name of a parameter in the model before PEFT changed it; None for one of an adapter's."""
    if MARK in name or any(f".{matrix}.{NAME}." in name for matrix in _MATRICES):
        return None
    return unwrapped(name)


def unwrapped(name: str) -> str:
    """The name of a parameter or buffer of the base in the model before PEFT put its layers around it."""
    return _WRAPPED.sub(".", name)


def map_adapters(model: nn.Module, table: ModelTable, config: LoraConfig | None) -> dict[str, Mapped]:
    """What a checkpoint of an adapter run holds, by parameter name: keys `adapter.<PEFT name>`."""
    if config is None:
        return {}
    found, of = {}, adapters_of(table, config)
    for name, parameter in model.named_parameters():
        if MARK in name:
            stored = stored_start(name)
            found[name] = whole(stored, f"adapter.{stored}", tuple(parameter.shape))
        if not parameter.requires_grad:
            continue
        stored = name.replace(f".{NAME}.", ".") if base_name(name) is None else name
        stored = stored.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
        found[name] = whole(stored, f"adapter.{stored}", tuple(parameter.shape))
        if stored in of and of[stored].num_experts > 1 and stored == of[stored].name_b:
            found[name] = _of_experts(stored, of[stored])
    return found


def _of_experts(name: str, adapter: Adapted) -> Mapped:
    """B of stacked experts, [o, r * experts] with experts next to each other: [o, r, expert] in checkpoints."""
    rows, rank, experts = adapter.out_features, adapter.rank, adapter.num_experts
    dims = (Dim(rows, (0, 0), (1, 1)), Dim(rank, (1, 1), (experts, 1)), Dim(experts, (1, 2), (1, 1)))
    key, shape = f"adapter.{name}", (rows, rank, experts)
    kept = tuple(dim for dim in dims if dim.size != 1)
    return Mapped(name, (rows, rank * experts), (Piece((name, key), ((0, 0), (0, 0, 0)), kept),), {key: shape})


def first_values(name: str, adapter: Adapted, weight: Tensor | None, first: int, count: int, seed: int) -> Tensor:
    """Rows `first` .. of a fresh tensor of an adapter, by PEFT's name. weight: the same rows of the adapted linear's.

    B is zero, magnitudes are the lengths of the weight's rows.
    """
    if name == adapter.name_a:
        return torch.from_numpy(kaiming_uniform(seed, name, count, adapter.in_features, first))
    if name == adapter.name_b:
        return torch.zeros(count, adapter.rank * adapter.num_experts)
    assert name == adapter.name_magnitude
    assert weight is not None
    return torch.linalg.vector_norm(weight.float(), dim=1)


def adapters_of(table: ModelTable, config: LoraConfig) -> Mapping[str, Adapted]:
    """PEFT's name of each tensor of the adapters -> its adapter."""
    own = adapted(config.own_table(table), config).values()
    return {name: each for each in own for name in (each.name_a, each.name_b, each.name_magnitude)}
