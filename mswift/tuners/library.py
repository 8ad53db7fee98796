"""Adapters of PEFT's methods in a loop of one's own: put on a model, switched, combined, set aside, saved, merged.

    model = prepare_model(model, TunerConfig("lora", fields={"r": 16, "lora_alpha": 32}))
    loss = model(input_ids, labels=labels).loss

PEFT's own objects do the work (`TunedModel.peft`); what is added here is strictness and setting adapters aside.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.adapter import open_adapter
from mswift.tuners.adapter_places import (
    META,
    Places,
    bytes_by_device,
    layers_of,
    move,
    places_of,
    read_back,
    stored_tensors,
)
from mswift.tuners.inject import NAME
from mswift.tuners.library_config import TunerConfig as TunerConfig
from mswift.tuners.library_config import check_name, check_targets
from mswift.tuners.library_start import (
    Batches,
    Initial,
    changes_base,
    gradients_before,
    inputs_behind,
    write,
)
from mswift.tuners.peft_config import CONFIG_FILE, check_adapter_dir, refuse_changed_base


def prepare_model(
    model: nn.Module, config: TunerConfig, name: str = NAME, batches: Batches | None = None
) -> "TunedModel":
    """`model` frozen, with an adapter of that name on it, which is active and trained.

    batches: for the starts that take data (init_lora_weights "eva", "lora_ga").
    """
    from peft import get_peft_model

    check_name(model, name)
    wanted = config.peft_config(generates=hasattr(model, "prepare_inputs_for_generation"), batches=batches)
    check_targets(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            gradients_before(model, wanted, batches)
            peft = get_peft_model(model, wanted, adapter_name=name)  # type: ignore[arg-type]
            inputs_behind(peft, wanted, batches, name)
            return TunedModel(peft)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{config.tuner_type}: PEFT: {error}") from error


class TunedModel(nn.Module):
    """A model with named adapters of one method. Called as the model; `parameters()` are all, most of them frozen."""

    def __init__(self, peft: Any) -> None:
        super().__init__()
        self.peft = peft
        self._kept: dict[str, tuple[Path, Places]] = {}  # adapters without memory -> where their values lie, and belong
        self._initial = {name: Initial(peft, name) for name, own in peft.peft_config.items() if changes_base(own)}
        self._no_prompts = False

    def forward(self, *args: Any, **options: Any) -> Any:
        """The model's."""
        return (self.peft.get_base_model() if self._no_prompts else self.peft)(*args, **options)

    @property
    def _has_prompts(self) -> bool:
        return any(config.is_prompt_learning for config in self.peft.peft_config.values())

    def _refuse_reduced_base(self, what: str) -> None:
        for name in self._initial:
            raise ConfigError(
                f"adapter {name!r} ({self.peft.peft_config[name].init_lora_weights}) has taken its start off the base, "
                f"and no other is {what} on what is left: save it, and load it on an untouched base beside the others"
            )

    def _refuse_prompts(self, what: str) -> None:
        if self._has_prompts:
            raise ConfigError(f"virtual tokens change no weight of the model, and are not {what}")

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of all."""
        return tuple(self.peft.peft_config)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of those that compute."""
        return () if self._is_off else tuple(self.peft.active_adapters)

    @property
    def _is_off(self) -> bool:
        return self._no_prompts or any(getattr(layer, "disable_adapters", False) for layer in layers_of(self.peft))

    def trained_parameters(self) -> list[nn.Parameter]:
        """What an optimizer takes."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def add(self, config: TunerConfig, name: str) -> None:
        """One more adapter of the same method; neither active nor trained."""
        self._refuse_reduced_base("added")
        self._check_new(name)
        check_targets(self.peft, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            try:
                generates = hasattr(self.peft, "prepare_inputs_for_generation")
                wanted = config.peft_config(generates=generates)
                if changes_base(wanted):
                    raise ConfigError(
                        f"adapter {name!r}: init_lora_weights={wanted.init_lora_weights!r} would take its start off "
                        "the base of the other adapters: give it to prepare_model"
                    )
                self.peft.add_adapter(name, wanted)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"adapter {name!r}: PEFT: {error}") from error
        self._train_one_prompt()

    def activate(self, *names: str) -> None:
        """These adapters compute from now on, their sum where there are several, and are trained; no other."""
        for name in names:
            self._require(name)
            if name in self._kept:
                self.bring_back(name)
        if self._has_prompts:
            if len(names) != 1:
                raise ConfigError(f"{len(names)} adapters of virtual tokens at a time: PEFT computes one")
            self._no_prompts = False
            self.peft.set_adapter(names[0])
            self._train_one_prompt()
            return
        self.peft.base_model.enable_adapter_layers()
        self.peft.base_model.set_adapter(list(names))

    def deactivate(self) -> None:
        """The base alone computes from now on, without the start of an adapter that was taken off it."""
        if self._has_prompts:
            self._no_prompts = True
            return
        self.peft.base_model.disable_adapter_layers()

    def combine(self, names: Sequence[str], weights: Sequence[float], name: str, how: str = "linear") -> None:
        """A new LoRA out of others, by PEFT's `add_weighted_adapter`; how: linear, svd, cat, ties, dare_ties, ..."""
        self._refuse_prompts("combined")
        self._refuse_reduced_base("combined")
        for each in names:
            self._require(each)
        if len(names) != len(weights):  # PEFT leaves out those without a weight
            raise ConfigError(f"{len(names)} adapters ({' '.join(names)}) and {len(weights)} weights: give one each")
        self._check_new(name)
        if not hasattr(self.peft.base_model, "add_weighted_adapter"):
            raise ConfigError("only LoRA (and IA3) adapters are combined; activate several of this method instead")
        self.peft.add_weighted_adapter(list(names), list(weights), name, combination_type=how)

    def set_aside(self, name: str, place: str | Path = "cpu") -> None:
        """Move an adapter that is not active to a device; or write it to a directory and keep no memory of it."""
        self._refuse_prompts("set aside")
        self._require_here(name)
        if name in self.active:
            raise ConfigError(f"adapter {name!r} is active: activate another one, or deactivate")
        if isinstance(place, str) and place.partition(":")[0] in ("cpu", "cuda"):
            move(places_of(self.peft, name), torch.device(place))
            return
        write(self.peft, Path(place), name)  # as it is, for this base
        places = places_of(self.peft, name)
        move(places, META)
        self._kept[name] = Path(place), places

    def bring_back(self, name: str) -> None:
        """An adapter that was set aside to where its base is."""
        self._require(name)
        device = next(p.device for p in self.peft.parameters() if p.device != META)
        if name not in self._kept:
            move(places_of(self.peft, name), device)
            return
        folder, places = self._kept[name]
        read_back(places, folder, device)
        del self._kept[name]

    def save(self, folder: Path, name: str = NAME) -> None:
        """As a PEFT directory, which `load`, PEFT and `mswift infer --adapters` take."""
        self._require_here(name)
        write(self.peft, folder, name, self._initial.get(name))

    def load(self, folder: Path, name: str) -> None:
        """An adapter from a PEFT directory, frozen until it is activated; CheckpointError where it does not fit."""
        self._refuse_reduced_base("loaded")
        if name not in self.adapters:
            check_name(self.peft, name)
        refuse_changed_base(check_adapter_dir(folder), folder / CONFIG_FILE)
        try:
            self.peft.load_adapter(str(folder), name)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: does not fit: {str(error).splitlines()[0]}") from error
        _, there = open_adapter(folder)
        wrong = sorted(there.keys() ^ stored_tensors(self.peft, name).keys())
        if wrong:
            raise CheckpointError(f"{folder}: {wrong[0]} is missing or has no place ({len(wrong)} such tensors)")
        self._train_one_prompt()

    def merge(self, *names: str) -> nn.Module:
        """The base with these adapters in its weights (those active, where none is named), without PEFT's layers."""
        self._refuse_prompts("merged")
        merged: nn.Module = self.peft.merge_and_unload(safe_merge=True, adapter_names=list(names) or None)
        return merged

    def unload(self) -> nn.Module:
        """The base as it was; without the start of an adapter that was taken off it."""
        if self._has_prompts:
            return self.peft.get_base_model()  # type: ignore[no-any-return]
        base: nn.Module = self.peft.unload()
        return base

    def adapter_bytes(self, name: str) -> Mapping[str, int]:
        """Device -> bytes of an adapter there; what lies in a directory is not counted."""
        return bytes_by_device(places_of(self.peft, name))

    def _require(self, name: str) -> None:
        if name not in self.adapters:
            near = ", ".join(get_close_matches(name, self.adapters, 3, 0.0))
            raise ConfigError(f"there is no adapter {name!r}; near: {near}")

    def _check_new(self, name: str) -> None:
        if name in self.adapters:
            raise ConfigError(f"adapter {name!r} is there already: {' '.join(self.adapters)}")
        check_name(self.peft, name)

    def _require_here(self, name: str) -> None:
        self._require(name)
        if name in self._kept:
            raise ConfigError(f"adapter {name!r} lies in {self._kept[name][0]}: bring_back first")

    def _train_one_prompt(self) -> None:
        """Of virtual tokens those that are active alone: PEFT freezes none."""
        if self._has_prompts:
            for name, encoder in self.peft.prompt_encoder.items():
                encoder.requires_grad_(name in self.peft.active_adapters)
