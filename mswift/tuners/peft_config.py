"""adapter_config.json: what mswift writes (as PEFT 0.21.2 does) and the strict reading of anybody's.

Reading refuses by name what would change the adapter's meaning and is not known here; a field that only
concerned its initialisation or its bookkeeping is ignored. A field PEFT adds later is refused unless it is off.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mswift import rundir
from mswift.converters.adapters import SAVABLE, Table, expand_modules_to_save
from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.methods import METHOD_TYPES
from mswift.tuners.peft_fields import flag, is_number, is_rank, layers, names, patterns
from mswift.tuners.prompts import PEFT_TYPES as PROMPT_TYPES
from mswift.tuners.settings import PeftSettings

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the HF model."""

_PEFT_VERSION = "0.21.2"
_OFF: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "fan_in_fan_out": False,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_config": None,
    "monteclora_config": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
"""Fields that are refused unless they have this value (or are off)."""

_PLAIN: Mapping[str, Any] = {
    "alpha_pattern": {},
    "exclude_modules": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_bias": False,
    "rank_pattern": {},
    "target_parameters": None,
    "use_dora": False,
    "use_rslora": False,
}
"""Fields that `PeftSettings` carries, as an adapter without them has them."""

_IGNORED: tuple[str, ...] = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
)
_IGNORED += ("qalora_group_size", "revision", "runtime_config", "task_type")
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")  # others (pissa, ...) also changed the base
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "init_lora_weights")


def peft_config(
    settings: PeftSettings, modules_to_save: Sequence[str], *, base_model: str | None, tied: bool
) -> dict[str, Any]:
    """The content of adapter_config.json. tied: the base ties its embeddings, and so does the adapter's copy."""
    alpha, modules = settings.alpha, settings.target_modules
    own = {
        "alpha_pattern": dict(settings.alpha_pattern),
        "exclude_modules": _as_json(settings.exclude_modules),
        "init_lora_weights": True if settings.init == "true" else settings.init,
        "layers_pattern": _as_json(settings.layers_pattern),
        "layers_to_transform": _as_json(settings.layers_to_transform),
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": settings.dropout,
        "r": settings.rank,
        "rank_pattern": dict(settings.rank_pattern),
        "target_modules": modules if isinstance(modules, str) else list(modules),
        "target_parameters": _as_json(settings.target_parameters),
        "use_dora": settings.dora,
        "use_rslora": settings.rslora,
    }
    return dict(
        sorted(
            {
                **_OFF,
                **_PLAIN,
                **own,
                "auto_mapping": None,
                "base_model_name_or_path": base_model,
                "ensure_weight_tying": tied and any(name in SAVABLE for name in modules_to_save),
                "inference_mode": True,
                "megatron_core": "megatron.core",
                "modules_to_save": list(modules_to_save) or None,
                "peft_type": "LORA",
                "peft_version": _PEFT_VERSION,
                "qalora_group_size": 16,
                "revision": None,
                "task_type": "CAUSAL_LM",
            }.items()
        )
    )


def _as_json(names: Sequence[object] | str) -> list[object] | str | None:
    """A pattern as it is; a list; None for an empty one, as PEFT writes it."""
    return names if isinstance(names, str) else list(names) or None


def adapter_files(
    table: Table, settings: PeftSettings, modules_to_save: Sequence[str], base_model: str | None
) -> dict[str, bytes]:
    """adapter_config.json by name, as a training checkpoint carries it in hf/."""
    saved = expand_modules_to_save(table, modules_to_save)
    content = peft_config(settings, saved, base_model=base_model, tied=table.spec.tied_embeddings)
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


def base_note(adapter: Path, model: Path) -> str | None:
    """What to say where an adapter names a base of another name than `model`: shapes may fit all the same."""
    said = read_adapter_json(adapter).get("base_model_name_or_path")
    name = Path(said).name if isinstance(said, str) else ""
    known = [*model.absolute().parts, *model.resolve().parts]
    if not name or any(
        part == name or part.endswith(f"--{name}") for part in known
    ):  # the hub's cache: models--a--name
        return None
    return (
        f"note: --adapters {adapter} was trained on {said} (base_model_name_or_path of its {CONFIG_FILE}), and --model "
        f"is {model}: where these are different models, the answers mean nothing"
    )


def read_adapter_json(path: Path, flag: str = "--adapters") -> dict[str, Any]:
    """Content of adapter_config.json; ConfigError where there is none, with what the directory is instead.

    flag: that named it.
    """
    if not path.is_dir():
        what = "this is a file" if path.exists() else "no such directory"
        raise ConfigError(f"{flag} {path}: {what}; give a PEFT directory")
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (path / rundir.COMMIT).is_file() or any(path.glob("checkpoint-*")):
            raise ConfigError(
                f"{flag} {path}: this is a training run or one of its checkpoints, not a PEFT adapter: "
                f"`mswift export --model {path} --output_dir ADAPTER_DIR` writes one"
            ) from None
        raise ConfigError(
            f"{flag} {path}: no {CONFIG_FILE}, so this is not a PEFT adapter (of a run, mswift export writes one)"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{flag} {path}: {CONFIG_FILE} is not JSON ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{flag} {path}: {CONFIG_FILE} cannot be read ({error.strerror})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{flag} {path}: {CONFIG_FILE} is not a JSON object")
    return config


def read_peft_config(adapter: Path, *, trained_here: bool = False) -> PeftSettings:
    """adapter_config.json of a PEFT directory; or of a checkpoint of ours, which keeps what PiSSA and OLoRA start from.

    Raises ConfigError for what mswift cannot honour, CheckpointError for a file that is no LoRA configuration.
    """
    return parse_peft_config(read_adapter_json(adapter), adapter / CONFIG_FILE, trained_here=trained_here)


def parse_peft_config(data: Mapping[str, Any], path: Path, *, trained_here: bool = False) -> PeftSettings:
    """The content of an adapter_config.json; `path` is its name in errors, which are those of `read_peft_config`."""
    init = data.get("init_lora_weights", True)
    if not trained_here:
        refuse_changed_base(data, path)
    _refuse_unsupported(data, path)
    rank, alpha = data.get("r"), data.get("lora_alpha")
    if not is_rank(rank) or not is_number(alpha):
        raise CheckpointError(f"{path}: r={rank!r} and lora_alpha={alpha!r} must be a positive integer and a number")
    layers_pattern = data.get("layers_pattern") or ()
    return PeftSettings(
        rank=rank,
        alpha=alpha,
        target_modules=names(data, "target_modules", path, required=not data.get("target_parameters")),
        modules_to_save=tuple(data.get("modules_to_save") or ()),
        dropout=float(data.get("lora_dropout") or 0.0),
        ensure_weight_tying=bool(data.get("ensure_weight_tying")),
        path=path,
        rslora=flag(data, "use_rslora", path),
        dora=flag(data, "use_dora", path),
        lora_bias=flag(data, "lora_bias", path),
        rank_pattern=patterns(data, "rank_pattern", path, is_rank),
        alpha_pattern=patterns(data, "alpha_pattern", path, is_number),
        exclude_modules=names(data, "exclude_modules", path),
        layers_to_transform=layers(data, path),
        layers_pattern=(layers_pattern,) if isinstance(layers_pattern, str) else tuple(layers_pattern),
        target_parameters=tuple(sorted(data.get("target_parameters") or ())),
        init="true" if init in _PLAIN_INITS else str(init),
    )


def refuse_changed_base(data: Mapping[str, Any], path: Path) -> None:
    """ConfigError for an adapter_config.json whose adapter belongs to a base without its start; `path` is its name."""
    init = data.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise ConfigError(
            f"{path}: init_lora_weights={init!r} has changed the base weights as well; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, or mswift export, which turns it into a plain LoRA"
        )


def _refuse_unsupported(data: Mapping[str, Any], path: Path) -> None:
    kind = data.get("peft_type")
    if kind in METHOD_TYPES:
        raise ConfigError(
            f"{path}: peft_type={kind!r}; this takes LORA only: train it with --tuner_type {kind.lower()}, serve it "
            "with --infer_backend transformers, or fold it into its base (mswift merge)"
        )
    if kind in PROMPT_TYPES.values():
        raise ConfigError(
            f"{path}: peft_type={kind!r} puts virtual tokens before every sequence; this takes LORA only: serve it "
            "with --infer_backend transformers"
        )
    if kind == "XLORA":
        raise ConfigError(
            f"{path}: peft_type='XLORA' mixes LoRAs token by token, and is none that could be merged, converted or "
            "given to vLLM; this takes LORA only: mswift export writes its directory, and --infer_backend "
            "transformers serves it"
        )
    if kind != "LORA":
        raise ConfigError(f"{path}: peft_type={kind!r}; mswift reads LORA")
    known = {*_OFF, *_PLAIN, *_IGNORED, *_READ, "ensure_weight_tying"}
    for name, value in data.items():
        if name == "eva_config" and data.get("init_lora_weights") == "eva":  # of a start that is over
            continue
        if name in _OFF and value and value != _OFF[name]:
            raise ConfigError(f"{path}: {name}={value!r} is not supported by mswift (only {name}={_OFF[name]!r})")
        if name not in known and value:
            raise ConfigError(
                f"{path}: {name}={value!r} is unknown to mswift (written by PEFT {data.get('peft_version')})"
            )
