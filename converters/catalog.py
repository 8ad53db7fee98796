"""From a model directory to its family: families are found by module name, `model_type` is the module."""

import difflib
import json
import pkgutil
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any

from mswift.converters import families
from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.named_once import named_once
from mswift.converters.quantization import FIELD, quantization_of
from mswift.converters.spec import ModelSpec
from mswift.errors import CheckpointError, ConfigError

_MANIFEST = "mswift_manifest.json"
IGNORED_FIELDS = "mswift_ignored_fields.json"
LARGEST_CONFIG_BYTES = 64 << 20
MOST_LAYERS = 10_000
MOST_EXPERTS = 1_000_000
_WRONG_KIND = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What reading a list as a number, and the like, raises."""

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "num_nextn_predict_layers")


def config_path(model: Path) -> Path:
    """The config.json of a Hugging Face directory, or the file that is given itself."""
    return model if model.is_file() else model / "config.json"


def read_config(model_dir: Path, ignored: Collection[str] | None = None, *, or_file: bool = False) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face directory, without the fields in `ignored`.

    or_file: the file itself, *.json, may be given. ignored: None for those that `--ignore_config_fields` named when the
    directory was made. ConfigError or CheckpointError in words.
    """
    path = config_path(model_dir)
    if not model_dir.exists():
        raise ConfigError(f"{model_dir} does not exist; --model takes a model directory on this machine")
    if model_dir.is_file() and not (or_file and model_dir.suffix == ".json"):
        raise ConfigError(
            f"{model_dir} is a file; --model takes a model directory on this machine (a dry run of training also a "
            "config.json)"
        )
    if not path.is_file():
        raise ConfigError(f"{model_dir}: no config.json; {what_it_is(model_dir)}")
    config = _parse(path)
    leave = ignored_fields(model_dir) if ignored is None else ignored
    return {name: value for name, value in config.items() if name not in leave}


def _parse(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_CONFIG_BYTES:
            raise CheckpointError(f"{path}: has {path.stat().st_size:,} bytes; that is no config.json")
        config = json.loads(path.read_text("utf-8"), object_pairs_hook=named_once)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(config).__name__}, not an object")
    return config


def ignored_fields(model: Path) -> tuple[str, ...]:
    """Config fields that `mswift convert --ignore_config_fields` named for this directory (or that of its hf/).

    They stand in the manifest; in a checkpoint of a training that started from there, in a file beside config.json.
    """
    home = model.parent if model.is_file() or model.name == "hf" else model
    for path in (model / IGNORED_FIELDS, model / _MANIFEST, home / _MANIFEST):
        if path.is_file():
            try:
                value = json.loads(path.read_text("utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise CheckpointError(f"{path}: is damaged ({error})") from None
            names = value.get("ignored_config_fields", []) if isinstance(value, dict) else []
            return tuple(str(name) for name in names) if isinstance(names, list) else ()
    return ()


def check_ignorable(config: dict[str, Any], ignored: Collection[str]) -> None:
    """ConfigError for a field of --ignore_config_fields that the family reads: the model depends on it."""
    if not ignored:
        return
    fields = Fields({name: value for name, value in config.items() if name not in ignored})
    family_for(config).spec(fields)
    read = [name for name in ignored if fields.has_read(name)]
    if read:
        raise ConfigError(
            f"--ignore_config_fields {','.join(read)}: the model depends on it; only what nothing reads can be ignored"
        )


def what_it_is(path: Path) -> str:
    """What a directory without config.json holds, and which command makes a Hugging Face directory of it."""
    if (path / "adapter_config.json").is_file():
        return (
            f"this is a PEFT adapter: give its base model as --model and this directory as --adapters, "
            f"or merge them with `mswift merge --adapters {path}`"
        )
    if (path / "COMMIT").is_file() or any(path.glob("checkpoint-*")):
        return (
            f"this is a training run or one of its checkpoints: "
            f"`mswift export --model {path} --output_dir HF_DIR` writes a Hugging Face directory "
            "(of a LoRA run: a PEFT adapter)"
        )
    if (path / ".metadata").is_file():
        return (
            f"this is a Megatron checkpoint: "
            f"`mswift convert --model {path} --to hf --output_dir HF_DIR` writes a Hugging Face directory"
        )
    return "this is not a model; give a directory with config.json, safetensors and a tokenizer"


def family_names() -> list[str]:
    """Supported values of model_type."""
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def family_for(config: dict[str, Any]) -> Family:
    """The family of `model_type`; ConfigError with the nearest name if there is none."""
    name = config.get("model_type")
    names = family_names()
    if name is None:
        raise ConfigError(f"config.json: has no model_type; write one of {', '.join(names)}")
    if not isinstance(name, str) or name not in names:
        near = difflib.get_close_matches(str(name), names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"config.json: model_type {name!r} is not supported (supported: {', '.join(names)}){hint}")
    family = import_module(f"{families.__name__}.{name}").FAMILY
    assert isinstance(family, Family)
    assert family.model_type == name
    return family


def spec_for(config: dict[str, Any], family: Family) -> ModelSpec:
    """The model's numbers; ConfigError for a field that is unknown or not supported."""
    quantization_of(config)
    for name in _LAYERS:
        if isinstance(config.get(name), int) and config[name] > MOST_LAYERS:
            raise ConfigError(f"config.json: field {name!r} is {config[name]}; at most {MOST_LAYERS:,} layers are read")
    fields = Fields({name: value for name, value in config.items() if name != FIELD})
    try:
        spec = family.spec(fields)
    except _WRONG_KIND as error:
        raise fields.wrong_kind(error) from None
    fields.finish(family.architecture)
    if spec.moe is not None and spec.num_layers * spec.moe.num_experts > MOST_EXPERTS:
        raise ConfigError(
            f"config.json: {spec.num_layers:,} layers of {spec.moe.num_experts:,} experts; at most "
            f"{MOST_EXPERTS:,} experts are read"
        )
    if spec.num_attention_heads % spec.num_kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {spec.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {spec.num_kv_heads}"
        )
    return spec
