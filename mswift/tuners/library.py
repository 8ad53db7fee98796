"""Adapters of PEFT's methods in a loop of one's own: put on a model, switched, combined, set aside, saved, merged.

    model = prepare_model(model, TunerConfig("lora", fields={"r": 16, "lora_alpha": 32}))
    loss = model(input_ids, labels=labels).loss

PEFT's own objects do the work (`TunedModel.peft`); what is added here is strictness and setting adapters aside.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.adapter import open_adapter
from mswift.tuners.inject import NAME
from mswift.tuners.library_config import TunerConfig as TunerConfig
from mswift.tuners.library_config import check_targets
from mswift.tuners.library_start import (
    Batches,
    Initial,
    changes_base,
    gradients_before,
    inputs_behind,
    write,
)
from mswift.tuners.peft_config import CONFIG_FILE, check_adapter_dir, refuse_changed_base

META = torch.device("meta")
Places = dict[str, tuple[Any, str, str]]
"""Name in a file -> (dictionary of PEFT's layer, adapter in it, name inside of a module or "")."""


def prepare_model(
    model: nn.Module, config: TunerConfig, name: str = NAME, batches: Batches | None = None
) -> "TunedModel":
    """`model` frozen, with an adapter of that name on it, which is active and trained.

    batches: for the starts that take data (init_lora_weights "eva", "lora_ga").
    """
    from peft import get_peft_model

    _check_name(model, name)
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
        return self._no_prompts or any(getattr(layer, "disable_adapters", False) for layer in self._layers())

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
            _move(self._places(name), torch.device(place))
            return
        write(self.peft, Path(place), name)  # as it is, for this base
        places = self._places(name)
        _move(places, META)
        _give_back_freed_memory()
        self._kept[name] = Path(place), places

    def bring_back(self, name: str) -> None:
        """An adapter that was set aside to where its base is."""
        self._require(name)
        device = next(p.device for p in self.peft.parameters() if p.device != META)
        if name not in self._kept:
            _move(self._places(name), device)
            return
        folder, places = self._kept[name]
        file, _ = open_adapter(folder)
        for stored, (owner, key, inner) in places.items():
            _put(owner, key, inner, file.get_tensor(stored).to(device))
        del self._kept[name]

    def save(self, folder: Path, name: str = NAME) -> None:
        """As a PEFT directory, which `load`, PEFT and `mswift infer --adapters` take."""
        self._require_here(name)
        write(self.peft, folder, name, self._initial.get(name))

    def load(self, folder: Path, name: str) -> None:
        """An adapter from a PEFT directory, frozen until it is activated; CheckpointError where it does not fit."""
        self._refuse_reduced_base("loaded")
        if name not in self.adapters:
            _check_name(self.peft, name)
        refuse_changed_base(check_adapter_dir(folder), folder / CONFIG_FILE)
        try:
            self.peft.load_adapter(str(folder), name)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: does not fit: {str(error).splitlines()[0]}") from error
        _, there = open_adapter(folder)
        wrong = sorted(there.keys() ^ self._stored(name).keys())
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
        found: dict[str, int] = {}
        for owner, key, inner in self._places(name).values():
            tensor = _get(owner, key, inner)
            if tensor.device != META:
                where = tensor.device.type
                found[where] = found.get(where, 0) + tensor.numel() * tensor.element_size()
        return found

    def _require(self, name: str) -> None:
        if name not in self.adapters:
            near = ", ".join(get_close_matches(name, self.adapters, 3, 0.0))
            raise ConfigError(f"there is no adapter {name!r}; near: {near}")

    def _check_new(self, name: str) -> None:
        if name in self.adapters:
            raise ConfigError(f"adapter {name!r} is there already: {' '.join(self.adapters)}")
        _check_name(self.peft, name)

    def _require_here(self, name: str) -> None:
        self._require(name)
        if name in self._kept:
            raise ConfigError(f"adapter {name!r} lies in {self._kept[name][0]}: bring_back first")

    def _train_one_prompt(self) -> None:
        """Of virtual tokens those that are active alone: PEFT freezes none."""
        if self._has_prompts:
            for name, encoder in self.peft.prompt_encoder.items():
                encoder.requires_grad_(name in self.peft.active_adapters)

    def _layers(self) -> Iterator[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return (module for module in self.peft.modules() if isinstance(module, BaseTunerLayer))

    def _stored(self, name: str) -> dict[str, Tensor]:
        """Name in a file -> tensor of the model."""
        from peft import get_peft_model_state_dict

        state = self.peft.state_dict(keep_vars=True)
        found: dict[str, Tensor] = get_peft_model_state_dict(
            self.peft, state_dict=state, adapter_name=name, save_embedding_layers=False
        )
        return found

    def _places(self, name: str) -> Places:
        by_id = {id(tensor): key for key, tensor in self._stored(name).items()}
        found: Places = {}
        for layer in self._layers():
            for part in layer.adapter_layer_names:
                owner = getattr(layer, part, None)
                entry = owner[name] if owner is not None and name in owner else None
                inner = dict(entry.named_parameters()) if isinstance(entry, nn.Module) else {"": entry}
                for leaf, tensor in inner.items():
                    if tensor is not None and id(tensor) in by_id:
                        found[by_id[id(tensor)]] = (owner, name, leaf)
        return found


def _move(places: Places, device: torch.device) -> None:
    for owner, key, inner in places.values():
        tensor = _get(owner, key, inner)
        _put(owner, key, inner, torch.empty_like(tensor, device=META) if device == META else tensor.to(device))


def _give_back_freed_memory() -> None:
    """To the system, where the C library keeps it for itself (glibc)."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _check_name(model: nn.Module, name: str) -> None:
    """PEFT tells adapters apart by their name in a tensor's: one that is there already loses tensors in a file."""
    if not name or "." in name or any(name in module.split(".") for module, _ in model.named_modules()):
        raise ConfigError(
            f"adapter {name!r}: PEFT would take it for a part of the model's own names: give it a word without dots "
            "that is no module's name or number"
        )


def _get(owner: Any, key: str, inner: str) -> Tensor:
    tensor: Tensor = owner[key].get_parameter(inner) if inner else owner[key]
    return tensor


def _put(owner: Any, key: str, inner: str, value: Tensor) -> None:
    """In place of a parameter of PEFT's layer, trained as it was."""
    made = nn.Parameter(value.detach(), requires_grad=_get(owner, key, inner).requires_grad)
    if not inner:
        owner[key] = made
        return
    path, _, leaf = inner.rpartition(".")
    owner[key].get_submodule(path)._parameters[leaf] = made
