"""adapter_config.json: what mswift writes (as PEFT 0.21.2 does) and the strict reading of anybody's.

Reading refuses by name what would change the adapter's meaning and is not implemented here; a field that only
concerned its initialisation or its bookkeeping is ignored. A field PEFT adds later is refused unless it is off.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mswift import rundir
from mswift.converters.adapters import (
    ALL_LINEAR,
    SAVABLE,
    LoraConfig,
    Table,
    expand_modules_to_save,
    linears,
    lora_shapes,
    saved_shapes,
)
from mswift.errors import CheckpointError, ConfigError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the HF model."""

_PEFT_VERSION = "0.21.2"
_OFF: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "monteclora_config": None,
    "rank_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
_IGNORED: tuple[str, ...] = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
)
_IGNORED += ("qalora_group_size", "revision", "runtime_config", "task_type")
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")  # others (pissa, olora, ...) also changed the base weights
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "init_lora_weights")


@dataclass(frozen=True)
class PeftSettings:
    """The fields of an adapter_config.json that say what the adapter is."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    modules_to_save: tuple[str, ...]
    dropout: float
    ensure_weight_tying: bool
    path: Path

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def selects(self, module: str) -> bool:
        """Whether PEFT gives this module (model.layers.0.self_attn.q_proj) an adapter: a suffix, or a whole regex."""
        if isinstance(self.target_modules, str):
            return self.target_modules == ALL_LINEAR or re.fullmatch(self.target_modules, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in self.target_modules)


def promised_shapes(table: Table, settings: PeftSettings) -> dict[str, tuple[int, ...]]:
    """What a configuration promises on this model: LoRA of the selected linears, and modules_to_save.

    Raises ConfigError when it selects no linear of the model.
    """
    modules = [linear for linear in linears(table) if settings.selects(linear.name)]
    if not modules:
        raise ConfigError(f"{settings.path}: target_modules={settings.target_modules!r} match no linear of the model")
    saved = tuple(name for name in SAVABLE if name in settings.modules_to_save)
    if len(saved) != len(set(settings.modules_to_save)):
        raise ConfigError(f"{settings.path}: modules_to_save={settings.modules_to_save!r}; known: {' '.join(SAVABLE)}")
    return lora_shapes(modules, settings.rank) | saved_shapes(table, saved)


def peft_config(
    config: LoraConfig, modules_to_save: Sequence[str], *, base_model: str | None, tied: bool
) -> dict[str, Any]:
    """The content of adapter_config.json. tied: the base ties its embeddings, and so does the adapter's copy."""
    alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    return dict(
        sorted(
            {
                **_OFF,
                "auto_mapping": None,
                "base_model_name_or_path": base_model,
                "ensure_weight_tying": tied and bool(modules_to_save),
                "inference_mode": True,
                "init_lora_weights": True,
                "lora_alpha": alpha,
                "lora_dropout": 0.0,
                "megatron_core": "megatron.core",
                "modules_to_save": list(modules_to_save) or None,
                "peft_type": "LORA",
                "peft_version": _PEFT_VERSION,
                "qalora_group_size": 16,
                "r": config.rank,
                "revision": None,
                "target_modules": list(config.target_modules),
                "task_type": "CAUSAL_LM",
            }.items()
        )
    )


def adapter_files(
    table: Table, config: LoraConfig, modules_to_save: Sequence[str], base_model: str | None
) -> dict[str, bytes]:
    """adapter_config.json by name, as a training checkpoint carries it in hf/."""
    saved = expand_modules_to_save(table, modules_to_save)
    content = peft_config(config, saved, base_model=base_model, tied=table.spec.tied_embeddings)
    return {CONFIG_FILE: (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()}


def check_adapter_dir(path: Path) -> dict[str, Any]:
    """Content of adapter_config.json of a directory that holds the weights as well.

    Raises ConfigError (no PEFT adapter there) and CheckpointError (a damaged one).
    """
    if (path / CONFIG_FILE).is_file() and not (path / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"--adapters {path}: {CONFIG_FILE} without {WEIGHTS_FILE}; "
            f"export the adapter again, or save it with save_pretrained(safe_serialization=True)"
        )
    return read_adapter_json(path)


def read_adapter_json(path: Path) -> dict[str, Any]:
    """Content of adapter_config.json; ConfigError where there is none, with what the directory is instead."""
    if not path.is_dir():
        what = "this is a file" if path.exists() else "no such directory"
        raise ConfigError(f"--adapters {path}: {what}; give a PEFT directory")
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (path / rundir.COMMIT).is_file() or any(path.glob("checkpoint-*")):
            raise ConfigError(
                f"--adapters {path}: this is a training run or one of its checkpoints, not a PEFT adapter: "
                f"`mswift export --model {path} --output_dir ADAPTER_DIR` writes one"
            ) from None
        raise ConfigError(
            f"--adapters {path}: no {CONFIG_FILE}, so this is not a PEFT adapter (of a run, mswift export writes one)"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"--adapters {path}: {CONFIG_FILE} is not JSON ({error})") from None
    except OSError as error:
        raise CheckpointError(f"--adapters {path}: {CONFIG_FILE} cannot be read ({error.strerror})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"--adapters {path}: {CONFIG_FILE} is not a JSON object")
    return config


def read_peft_config(adapter: Path) -> PeftSettings:
    """adapter_config.json of a PEFT directory.

    Raises ConfigError for what mswift cannot honour, CheckpointError for a file that is no LoRA configuration.
    """
    path, data = adapter / CONFIG_FILE, read_adapter_json(adapter)
    _refuse_unsupported(data, path)
    rank, alpha, targets = data.get("r"), data.get("lora_alpha"), data.get("target_modules")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{path}: r={rank!r} and lora_alpha={alpha!r} must be a positive integer and a number")
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise CheckpointError(f"{path}: target_modules={targets!r} must be a list of module names or a pattern")
    try:
        re.compile(targets if isinstance(targets, str) else "")
    except re.error as error:
        raise CheckpointError(f"{path}: target_modules={targets!r} is no regular expression ({error})") from None
    return PeftSettings(
        rank=rank,
        alpha=alpha,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        modules_to_save=tuple(data.get("modules_to_save") or ()),
        dropout=float(data.get("lora_dropout") or 0.0),
        ensure_weight_tying=bool(data.get("ensure_weight_tying")),
        path=path,
    )


def _refuse_unsupported(data: Mapping[str, Any], path: Path) -> None:
    if data.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type={data.get('peft_type')!r}; mswift reads LORA")
    if data.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise ConfigError(
            f"{path}: init_lora_weights={data['init_lora_weights']!r} has changed the base weights as well; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion, which turns it into a plain LoRA"
        )
    known = {*_OFF, *_IGNORED, *_READ, "ensure_weight_tying"}
    for name, value in data.items():
        if name in _OFF and value and value != _OFF[name]:
            raise ConfigError(f"{path}: {name}={value!r} is not supported by mswift (only {name}={_OFF[name]!r})")
        if name not in known and value:
            raise ConfigError(
                f"{path}: {name}={value!r} is unknown to mswift (written by PEFT {data.get('peft_version')})"
            )
