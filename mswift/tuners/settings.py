"""What an adapter_config.json says an adapter is: which modules, at which rank and scale; matched as PEFT does."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mswift.converters.adapters import ALL_LINEAR

FROM_DATA = ("eva", "lora_ga")
"""Values of `PeftSettings.init` that take a pass over data before the first step."""


@dataclass(frozen=True)
class PeftSettings:
    """The fields of an adapter_config.json that say what the adapter is.

    rslora: the scale is alpha / sqrt(rank); dora: every module has a magnitude vector as well; lora_bias: B has a
    bias. rank_pattern, alpha_pattern: regular expression of a module's name -> its own rank or alpha.
    layers_pattern: names of the module list that `layers_to_transform` counts in ((): any). target_parameters: names
    of parameters (the experts of transformers 5) that have an adapter of their own. init: pissa, pissa_niter_N,
    olora and lora_ga start A and B as a part of the weight, which is not to be added twice; eva starts A alone.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    modules_to_save: tuple[str, ...] = ()
    dropout: float = 0.0
    ensure_weight_tying: bool = False
    path: Path = Path("adapter_config.json")
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    init: str = "true"

    @property
    def starts_in_weight(self) -> bool:
        """Whether A and B start as a part of the weight."""
        return self.init not in ("true", "eva")

    def rank_of(self, name: str) -> int:
        """Rank of one module or parameter."""
        return self.rank_pattern.get(_pattern_for(self.rank_pattern, name), self.rank)

    def scale_of(self, name: str) -> float:
        """What B @ A of one module or parameter is multiplied with."""
        rank = self.rank_of(name)
        alpha = self.alpha_pattern.get(_pattern_for(self.alpha_pattern, name), self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def selects(self, module: str) -> bool:
        """Whether PEFT gives this module (model.layers.0.self_attn.q_proj) an adapter: a suffix, or a whole regex."""
        if self._excludes(module):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules == ALL_LINEAR or re.fullmatch(self.target_modules, module) is not None
        if module in self.target_modules:
            return True
        return _ends_with(module, self.target_modules) and self._in_layers(module)

    def selects_parameter(self, name: str) -> bool:
        """Whether PEFT gives this parameter (model.layers.0.mlp.experts.down_proj) an adapter."""
        return name in self.target_parameters or _ends_with(name, self.target_parameters)

    def _excludes(self, module: str) -> bool:
        if isinstance(self.exclude_modules, str):
            return re.fullmatch(self.exclude_modules, module) is not None
        return module in self.exclude_modules or _ends_with(module, self.exclude_modules)

    def _in_layers(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        return found is not None and int(found[1]) in self.layers_to_transform


def _ends_with(name: str, endings: Sequence[str]) -> bool:
    return any(name.endswith(f".{ending}") for ending in endings)


def _pattern_for(patterns: Mapping[str, object], name: str) -> str:
    """The first pattern that the end of a name matches, or the name."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), name)
