"""An adapter of one of PEFT's methods beside LoRA: which linears, which fields; its tensors and its file. No torch.

Tensors are named as in PEFT's file without `base_model.model.`; what all linears share is named from `base_model.` on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mswift.converters.adapters import (
    ALL_LINEAR,
    SAVABLE,
    HfLinear,
    expand_modules_to_save,
    fused_linears,
    refuse_recurrent,
    saved_shapes,
    unknown_module,
)
from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError
from mswift.tuners.methods import METHODS, Fields, Method
from mswift.tuners.peft_config import PREFIX
from mswift.tuners.prompts import EMBEDDINGS
from mswift.tuners.settings import PeftSettings
from mswift.tuners.shapes import adapted_linears
from mswift.tuners.targets import linear_leaves, renamed

_SHARED = "base_model."
_BOOKKEEPING = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision")
_OFF: Mapping[str, Any] = {"bias": "none", "fan_in_fan_out": False}


def full_name(name: str) -> str:
    """As PEFT's file has it."""
    return name if name.startswith(_SHARED) or name == EMBEDDINGS else PREFIX + name


def place_of(name: str) -> tuple[str, str]:
    """(folder of an adapter's directory, name in PEFT's file there); each LoRA that X-LoRA mixes has a folder."""
    number, dot, rest = name.partition(".")
    return (number, PREFIX + rest) if dot and number.isdecimal() else ("", full_name(name))


def short_name(name: str) -> str:
    """Without the prefix that the tensors of single linears have in PEFT's file."""
    return name.removeprefix(PREFIX)


@dataclass(frozen=True)
class MethodConfig:
    """fields: of PEFT's configuration, all of them; target_modules: leaf names; seed: of the start values."""

    method: Method
    fields: Fields
    target_modules: tuple[str, ...]
    seed: int = 0

    @staticmethod
    def for_table(
        table: ModelTable, name: str, *, target_modules: Sequence[str], fields: Fields, seed: int = 0
    ) -> "MethodConfig":
        """`fields`: those that are not PEFT's defaults. ConfigError for names and values that do not fit."""
        method = METHODS[name]
        own = {**method.fields, **_checked(method, fields)}
        leaves = _leaves(table, name, target_modules)
        if "feedforward_modules" in own:
            own["feedforward_modules"] = _feedforward(table, own["feedforward_modules"], leaves)
        made = MethodConfig(method, own, leaves, seed)
        made.shapes(table)
        return made

    def linears(self, table: ModelTable) -> list[HfLinear]:
        """Those that it adapts; ConfigError where there are none."""
        found = adapted_linears(table, PeftSettings(rank=1, alpha=1, target_modules=self.target_modules))
        if not found:
            raise ConfigError(f"--target_modules {' '.join(self.target_modules)}: no linear of the model")
        return found

    def shapes(self, table: ModelTable) -> dict[str, tuple[int, ...]]:
        """Every tensor of PEFT's file."""
        linears = self.linears(table)
        own = {
            f"{each.name}.{part}": shape
            for each in linears
            for part, shape in self.method.shapes(self.fields, each).items()
        }
        return own | self.method.shared(self.fields, linears)

    def trained_shapes(self, table: ModelTable) -> dict[str, tuple[int, ...]]:
        """Those of them that are trained."""
        return {name: shape for name, shape in self.shapes(table).items() if name not in self.method.frozen}

    def file_shapes(self, table: ModelTable, modules_to_save: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """`shapes`, and the modules that are trained in full (of tied embeddings under both names)."""
        return self.shapes(table) | saved_shapes(table, expand_modules_to_save(table, modules_to_save))

    def content(
        self, table: ModelTable, modules_to_save: Sequence[str] = (), base_model: str | None = None
    ) -> dict[str, Any]:
        """Of adapter_config.json: what PEFT's configuration class takes."""
        saved = expand_modules_to_save(table, modules_to_save)
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in self.fields.items()}
        common = {
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "modules_to_save": list(saved) or None,
            "peft_type": self.method.peft_type,
            "target_modules": list(self.target_modules),
            "task_type": "CAUSAL_LM",
        }
        return dict(sorted({**own, **common}.items()))

    def text(self, table: ModelTable, modules_to_save: Sequence[str], base_model: str | None) -> bytes:
        """The file adapter_config.json."""
        return (json.dumps(self.content(table, modules_to_save, base_model), indent=2) + "\n").encode()


def parse_method(data: Mapping[str, Any], path: Path, seed: int = 0) -> tuple[MethodConfig, tuple[str, ...]]:
    """(adapter, modules_to_save) of the content of an adapter_config.json; ConfigError for what is not carried."""
    types = {method.peft_type: method for method in METHODS.values()}
    method = types.get(str(data.get("peft_type")))
    if method is None:
        raise ConfigError(f"{path}: peft_type={data.get('peft_type')!r}; mswift reads LORA {' '.join(sorted(types))}")
    known = {*method.fields, *_BOOKKEEPING, *_OFF, "modules_to_save", "target_modules", "task_type"}
    for name, value in data.items():
        if value and name in _OFF and value != _OFF[name]:
            raise ConfigError(f"{path}: {name}={value!r} is not supported by mswift (only {name}={_OFF[name]!r})")
        if value and name not in known and value != _unread(method).get(name):
            raise ConfigError(f"{path}: {name}={value!r} is not supported by mswift for {method.peft_type}")
    targets = data.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ConfigError(f"{path}: target_modules={targets!r} must be a list of module names")
    given = {name: data[name] for name in method.fields if data.get(name) is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    fields = {**method.fields, **_checked(method, given, f"{path}: ")}
    return MethodConfig(method, fields, tuple(targets), seed), tuple(data.get("modules_to_save") or ())


def _unread(method: Method) -> Mapping[str, Any]:
    """Fields that PEFT 0.21.2 writes with these values, which are what happens without them."""
    own = {"init_weights": True, "init_ia3_weights": True, "r": 8, "init_lora_weights": True}
    values: dict[str, Any] = own | {
        "boft_n_butterfly_factor": 1,
        "eps": 6e-5,
        "mini_r": 1,
        "megatron_core": "megatron.core",
    }
    return {name: value for name, value in values.items() if name not in method.fields} | {"qalora_group_size": 16}


def _checked(method: Method, given: Fields, where: str = "--tuner_config: ") -> dict[str, Any]:
    """The fields in the types of their defaults; ConfigError for unknown ones, with the nearest names."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in method.fields:
            near = get_close_matches(name, method.fields, 3, 0.5)
            known = f"near: {', '.join(near)}" if near else f"known: {' '.join(method.fields)}"
            raise ConfigError(f"{where}{method.name} has no field {name!r}; {known}")
        found[name] = _typed(value, method.fields[name], f"{where}{name} {value!r}")
    own = {**method.fields, **found}
    _check_values(method, own, where)
    return found


def _typed(value: Any, default: Any, what: str) -> Any:
    if isinstance(default, bool):
        right, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        right, kind = type(value) is int, "a whole number"
    elif isinstance(default, float):
        right, kind = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    else:
        right = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        kind, value = "a list of names", tuple(value) if right else value
    if not right:
        raise ConfigError(f"{what} must be {kind}")
    return float(value) if isinstance(default, float) else value


_POSITIVE = ("r", "init_r", "target_r", "n_frequency", "num_vectors", "vector_length", "topk", "deltaT")


def _check_values(method: Method, own: Fields, where: str) -> None:
    """ConfigError for values that PEFT computes nothing, or something else, with."""
    blocks = {"boft": ("boft_block_size", "boft_block_num"), "oft": ("oft_block_size", "r")}.get(method.name)
    for name in _POSITIVE:
        if name in own and own[name] < 1 and name not in (blocks or ()):
            raise ConfigError(f"{where}{name} {own[name]} must be at least 1")
    if blocks and (min(own[b] for b in blocks) < 0 or sum(own[b] > 0 for b in blocks) != 1):
        one, other = blocks
        raise ConfigError(
            f"{where}{one} {own[one]} and {other} {own[other]}: give one of them and 0 for the other; their product is "
            "the number of inputs"
        )
    for name in ("lora_dropout", "vera_dropout", "vblora_dropout", "miss_dropout"):
        if name in own and not 0 <= own[name] < 1:
            raise ConfigError(f"{where}{name} {own[name]} must be at least 0 and below 1")
    for name in ("lora_alpha", "alpha"):
        if name in own and own[name] <= 0:
            raise ConfigError(f"{where}{name} {own[name]} must be positive")
    if method.name == "adalora" and own["target_r"] >= own["init_r"]:
        raise ConfigError(
            f"{where}target_r {own['target_r']} must be below init_r {own['init_r']}: AdaLoRA takes ranks away until "
            "target_r are left on average"
        )
    if method.name == "adalora" and not (0 < own["beta1"] < 1 and 0 < own["beta2"] < 1 and own["orth_reg_weight"] >= 0):
        raise ConfigError(f"{where}beta1 and beta2 must lie between 0 and 1, orth_reg_weight must be at least 0")
    if method.name == "vblora" and own["topk"] > own["num_vectors"]:
        raise ConfigError(f"{where}topk {own['topk']} is more than num_vectors {own['num_vectors']}")


def _leaves(table: ModelTable, method: str, modules: Sequence[str]) -> tuple[str, ...]:
    """--target_modules as leaf names of linears outside experts; ConfigError for other names, with the nearest ones."""
    refuse_recurrent(table)
    leaves, experts = linear_leaves(table), renamed(table)
    if not modules:
        raise ConfigError(f"--target_modules is empty: give {ALL_LINEAR} or some of {' '.join(leaves)}")
    for name in modules:
        if name in SAVABLE:
            raise ConfigError(
                f"--target_modules {name}: no adapter on embeddings; train it in full with --modules_to_save {name}"
            )
        if name in experts:
            raise ConfigError(
                f"--target_modules {name}: these are experts or routers, which PEFT adapts by LoRA only: use "
                f"--tuner_type lora, or some of {' '.join(leaves)}"
            )
        if name != ALL_LINEAR and name not in leaves:
            raise ConfigError(unknown_module("--target_modules", name, [ALL_LINEAR, *leaves]))
    return tuple(leaf for leaf in leaves if ALL_LINEAR in modules or leaf in modules)


def _feedforward(table: ModelTable, given: Sequence[str], leaves: Sequence[str]) -> tuple[str, ...]:
    """Linears of IA3 whose inputs are scaled; where none are named the last one of each feed-forward block."""
    if not given:
        last = fused_linears(table).get("mlp.linear_fc2", ())
        return tuple(leaf for leaf in leaves if leaf in last)
    for name in given:
        if name not in leaves:
            raise ConfigError(
                f"--tuner_config: feedforward_modules has {name!r}, which is not among the adapted {' '.join(leaves)}"
            )
    return tuple(given)
