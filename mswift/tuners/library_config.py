"""What an adapter in a loop of one's own is to be: a method of PEFT, its fields, the modules it is on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import nn

from mswift.errors import ConfigError
from mswift.tuners.library_start import Batches, check_start


@dataclass(frozen=True)
class TunerConfig:
    """tuner_type: of PEFT (`lora`, `oft`, ...); fields: of its configuration; target_modules: names of linears."""

    tuner_type: str = "lora"
    target_modules: tuple[str, ...] = ("all-linear",)
    fields: Mapping[str, Any] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    seed: int = 42

    def peft_config(self, *, generates: bool = True, batches: Batches | None = None) -> Any:
        """PEFT's object; ConfigError for a type or a field that PEFT does not have, with the nearest ones.

        generates: the model is a causal language model of transformers; batches: to start from.
        """
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import PeftType

        types = {kind.value.lower(): kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
        if self.tuner_type not in types:
            near = ", ".join(get_close_matches(self.tuner_type, types, 3, 0.3))
            raise ConfigError(f"tuner_type {self.tuner_type!r} is no method of PEFT; near: {near}")
        if self.tuner_type == "xlora":
            raise ConfigError(
                "tuner_type xlora: PEFT 0.21.2 writes only a part of what X-LoRA trains: train it by mswift sft "
                "--tuner_type xlora --xlora_adapters DIR DIR ..., whose export PEFT reads"
            )
        made: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(types[self.tuner_type])]
        for name in self.fields:
            if name not in made.__dataclass_fields__:
                near = ", ".join(get_close_matches(name, made.__dataclass_fields__, 3, 0.3))
                raise ConfigError(f"{made.__name__} has no field {name!r}; near: {near}")
        check_start(self.fields, batches)
        every = self.target_modules == ("all-linear",)
        own: dict[str, Any] = {"target_modules": "all-linear" if every else list(self.target_modules)}
        if "target_modules" not in made.__dataclass_fields__:
            if not every or self.modules_to_save:
                raise ConfigError(f"{self.tuner_type} has virtual tokens, and no target_modules or modules_to_save")
            own = {}
        own |= {"modules_to_save": list(self.modules_to_save)} if self.modules_to_save else {}
        try:
            return made(task_type="CAUSAL_LM" if generates else None, **own | dict(self.fields))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{made.__name__}: {error}") from error


def check_targets(model: nn.Module, config: TunerConfig) -> None:
    """ConfigError for names that no linear of the model ends with, with the nearest ones."""
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    leaves = {name.removesuffix(".base_layer").rpartition(".")[2] for name in linears}
    for name in config.target_modules:
        last = name.rpartition(".")[2]
        if name != "all-linear" and last not in leaves:
            near = ", ".join(get_close_matches(last, sorted(leaves), 3, 0.3))
            raise ConfigError(f"target_modules {name!r}: no linear of the model ends so; near: {near}")


def check_name(model: nn.Module, name: str) -> None:
    """PEFT tells adapters apart by their name in a tensor's: one that is there already loses tensors in a file."""
    if not name or "." in name or any(name in module.split(".") for module, _ in model.named_modules()):
        raise ConfigError(
            f"adapter {name!r}: PEFT would take it for a part of the model's own names: give it a word without dots "
            "that is no module's name or number"
        )
