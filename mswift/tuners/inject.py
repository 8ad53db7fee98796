"""PEFT's layers of one adapter put into a model, whose weights may be without memory, and their tensors by name.

What PEFT draws for the start depends on the seed and the order of the modules alone: every rank draws the same values.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mswift.errors import ConfigError
from mswift.tuners.method import short_name

NAME = "default"
"""Under which PEFT keeps an adapter."""


@dataclass(frozen=True)
class Injected:
    """tuner: PEFT's object (`AdaLoraModel`, ...); tensors: name (`method.short_name`) -> parameter, or constant."""

    tuner: Any
    tensors: Mapping[str, Tensor]


def inject(model: nn.Module, content: Mapping[str, Any], seed: int) -> Injected:
    """Change the linears of `model` in place; the adapter is fp32, in host memory, at its start.

    content: of adapter_config.json. ConfigError for what PEFT refuses.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    kind = PeftType(content["peft_type"])
    own = {name: value for name, value in content.items() if name not in ("peft_type", "modules_to_save")}
    with torch.random.fork_rng(devices=[]), stand_ins(model), _environment(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of BOFT, that there is no CUDA extension; of HRA, that a rank is odd
        torch.manual_seed(seed)
        try:
            config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](**own | {"inference_mode": False})
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[kind](model, config, NAME)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"--tuner_config: PEFT refuses this {kind.value.lower()}: {error}") from error
    return Injected(tuner, _tensors(tuner))


@contextmanager
def _environment() -> Iterator[None]:
    """PEFT's BOFT names a compiler in the environment while it looks for its CUDA extension."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Zeros that take no memory for weights without memory: PEFT puts an adapter where its linear's weight is."""
    replaced: list[tuple[nn.Module, nn.Parameter]] = []
    for module in model.modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        if weight is not None and weight.device.type == "meta":
            replaced.append((module, weight))
            module._parameters["weight"] = nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False)
    try:
        yield
    finally:
        for module, weight in replaced:
            module._parameters["weight"] = weight


def _tensors(tuner: Any) -> dict[str, Tensor]:
    """By the names that PEFT itself gives them in a file."""
    from peft import get_peft_model_state_dict

    holder: Any = nn.Module()
    holder.base_model, holder.peft_config = tuner, tuner.peft_config
    every = holder.state_dict(keep_vars=True)
    found = get_peft_model_state_dict(holder, state_dict=every, adapter_name=NAME, save_embedding_layers=False)
    return {short_name(name): tensor for name, tensor in found.items()}
