"""From a model directory to its family: families are found by module name, `model_type` is the module."""

import difflib
import json
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

from mswift.converters import families
from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.errors import CheckpointError, ConfigError


def read_config(model_dir: Path) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face directory; ConfigError or CheckpointError in words."""
    path = model_dir / "config.json"
    if not model_dir.is_dir():
        what = "is a file" if model_dir.exists() else "does not exist"
        raise ConfigError(f"{model_dir} {what}; --model takes a model directory on this machine")
    if not path.is_file():
        raise ConfigError(f"{model_dir}: no config.json; {what_it_is(model_dir)}")
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(config).__name__}, not an object")
    return config


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
    if name not in names:
        near = difflib.get_close_matches(str(name), names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"config.json: model_type {name!r} is not supported (supported: {', '.join(names)}){hint}")
    family = import_module(f"{families.__name__}.{name}").FAMILY
    assert isinstance(family, Family)
    assert family.model_type == name
    return family


def spec_for(config: dict[str, Any], family: Family) -> ModelSpec:
    """The model's numbers; ConfigError for a field that is unknown or not supported."""
    fields = Fields(config)
    spec = family.spec(fields)
    fields.finish(family.architecture)
    if spec.num_attention_heads % spec.num_kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {spec.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {spec.num_kv_heads}"
        )
    return spec
