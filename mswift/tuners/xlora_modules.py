"""X-LoRA in a transformers model: PEFT's layers and classifier, and the pass that comes before every pass.

PEFT runs that pass in a hook that lives as long as a call; here the scales stay until the next pass, so that layers may
be computed again in the backward pass, and a cache has a half for either pass, so that one token at a time is enough.
Shapes: b rows, s positions, h hidden, n LoRAs, L linears that have one.
"""

import copy
import re
import warnings
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError
from mswift.tuners.inject import stand_ins
from mswift.tuners.peft_config import peft_config
from mswift.tuners.settings import PeftSettings
from mswift.tuners.shapes import adapted_linears
from mswift.tuners.xlora import CLASSIFIER, STORED_CLASSIFIER, XloraConfig, own_table

_LORA = re.compile(r"(.+)\.(lora_[AB])\.(\d+)\.weight")
_MIXER = "xlora_mixer"
_CACHES = ("past_key_values", "cache_params")
"""How models call their cache."""
_Cache = TypeVar("_Cache", bound=Any)
"""transformers' DynamicCache."""


class Mixer:
    """Mixes the LoRAs of a model, which it puts there with fp32 tensors at their start; `tensors`: those by name.

    disabled: the model computes without them.
    """

    def __init__(self, model: Any, table: ModelTable, config: XloraConfig) -> None:
        self.disabled = False
        self._config, self._decoder = config, model.base_model
        self._scales: Tensor | None = None
        from peft.tuners.lora import LoraLayer

        with torch.random.fork_rng(devices=[]), stand_ins(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are several adapters
            torch.manual_seed(config.seed)
            for number, lora in enumerate(config.loras):
                _add_lora(model, table, lora, str(number))
            named: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
            self._layers = [layer for _, layer in named]
            self.classifier = self._made_classifier(model)
        setattr(model, CLASSIFIER, self.classifier)
        setattr(model, _MIXER, self)
        self.tensors = _tensors(model)
        self._decoder.register_forward_pre_hook(self._before, with_kwargs=True)
        for name, layer in named:
            layer.register_forward_pre_hook(partial(self._with_scales, name), with_kwargs=True)

    def _made_classifier(self, model: Any) -> Any:
        """PEFT's, behind which its layers take scales."""
        from peft import XLoraConfig
        from peft.tuners.xlora.classifier import XLoraClassifier
        from peft.tuners.xlora.model import convert_layers_to_xlora

        config = self._config
        names = [str(number) for number in range(len(config.loras))]
        fields = {**config.fields, "top_k_lora": config.fields["top_k_lora"] or None}
        settings = XLoraConfig(hidden_size=config.hidden_size, adapters=dict.fromkeys(names, ""), **fields)
        for layer in self._layers:
            layer.set_adapter(names)
        swapped, _ = convert_layers_to_xlora(model, self, settings)  # type: ignore[arg-type]
        if swapped != len(self._layers):
            raise ConfigError(
                f"--tuner_type xlora: PEFT mixes the LoRAs of {swapped} of {len(self._layers)} modules, those of plain "
                "linears: use a base in float32 or bfloat16, and LoRAs of linears"
            )
        model.requires_grad_(False)
        return XLoraClassifier(model, settings, len(names), swapped, torch.device("cpu")).float()

    def _before(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """The first pass, and out of its hidden states the scales of the second."""
        if self.disabled:
            return None
        caches = {name: _halves(kwargs[name]) for name in _CACHES if kwargs.get(name) is not None}
        first, second = ({name: halves[place] for name, halves in caches.items()} for place in range(2))
        value = self._config.fields["scaling_pass_value"]
        states = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        shape = (*states.shape[:2], len(self._layers), len(self._config.loras))
        self.disabled, self._scales = value == 0, torch.full(shape, value, device=states.device)
        try:
            with torch.no_grad():
                found = decoder.forward(*args, **kwargs | first)
        finally:
            self.disabled = False
        hidden = found.last_hidden_state.float()  # [b, s, h]; of language models the last of `hidden_states`
        self._scales = self.classifier(SimpleNamespace(hidden_states=(hidden,)), inputs_embeds=hidden)  # [b, s, L, n]
        return args, kwargs | second

    def _with_scales(self, name: str, _: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self.disabled:
            return args, kwargs
        assert self._scales is not None
        if args[0].shape[:-1] != self._scales.shape[:2]:
            raise ConfigError(
                f"X-LoRA of {name}: its inputs are {list(args[0].shape)} in this model, and scales are of "
                f"{list(self._scales.shape[:2])} rows and positions: mix LoRAs without {name.rpartition('.')[2]}"
            )
        return args, kwargs | {"scalings": self._scales}


def mixer_of(model: Any) -> Mixer | None:
    """That of a model, if it has one."""
    found: Mixer | None = getattr(model, _MIXER, None)
    return found


def first_classifier(table: ModelTable, config: XloraConfig) -> Mapping[str, Tensor]:
    """The tensors of a classifier before training, by their names in a file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        found: dict[str, Tensor] = {}
        for name, shape in config.classifier_shapes(table).items():
            if name.endswith(".weight"):
                linear = nn.Linear(shape[1], shape[0])  # as PEFT starts it
                found |= {name: linear.weight.detach(), name.removesuffix("weight") + "bias": linear.bias.detach()}
    return found


def _add_lora(model: Any, table: ModelTable, lora: PeftSettings, name: str) -> None:
    """PEFT's layers of one LoRA, around or in those of the others: modules are named in full, as none is in a layer."""
    from peft import LoraConfig, inject_adapter_in_model

    linears = [linear.name for linear in adapted_linears(own_table(table), lora)]
    content = peft_config(lora, (), base_model=None, tied=False)
    content |= {"target_modules": linears, "inference_mode": False}
    content |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    try:
        inject_adapter_in_model(LoraConfig(**content), model, adapter_name=name)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{lora.path}: PEFT refuses this LoRA: {error}") from error


def _tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """By the names of `XloraConfig.shapes`."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.startswith(f"{CLASSIFIER}."):
            found[STORED_CLASSIFIER + name.removeprefix(f"{CLASSIFIER}.")] = parameter
        elif match := _LORA.fullmatch(name):
            parameter.data = parameter.data.float()
            found[f"{match[3]}.{match[1]}.{match[2]}.weight"] = parameter
    return found


def doubled(cache: _Cache, other: _Cache) -> _Cache:
    """A cache for both passes out of two for one."""
    whole: Any = cache
    whole.layers = [*cache.layers, *other.layers]
    return cache


def _halves(cache: Any) -> tuple[Any, Any]:
    """Of `doubled`: the caches of the first and the second pass, whose layers are the same."""
    count = len(cache.layers) // 2
    first, second = copy.copy(cache), copy.copy(cache)
    first.layers, second.layers = cache.layers[:count], cache.layers[count:]
    return first, second
