"""Is this a directory that `mswift infer` can load, and if not, which command makes one of it. Torch-free."""

import json
from pathlib import Path
from typing import Any

from mswift.errors import CheckpointError, ConfigError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def check_model_dir(path: Path, flag: str = "--model") -> None:
    """Refuse what is not a Hugging Face model directory with a tokenizer; the message names the remedy.

    Raises ConfigError.
    """
    if not path.is_dir():
        raise ConfigError(f"{flag} {path}: no such directory (mswift reads local Hugging Face directories)")
    if not (path / "config.json").is_file():
        raise ConfigError(f"{flag} {path}: no config.json; " + _what_it_is(path))
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(
            f"{flag} {path}: no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); "
            f"copy tokenizer.json and tokenizer_config.json there from the model that it was trained from"
        )


def _what_it_is(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return (
            f"this is a PEFT adapter: give its base model as --model and this directory as --adapters, "
            f"or merge them with `mswift merge --adapters {path}`"
        )
    if (path / "COMMIT").is_file() or any(path.glob("checkpoint-*")):
        return (
            f"this is a training run or one of its checkpoints: "
            f"`mswift export --model {path} --output_dir HF_DIR` writes a Hugging Face directory"
        )
    if (path / ".metadata").is_file():
        return (
            f"this is a Megatron checkpoint: "
            f"`mswift convert --model {path} --to hf --output_dir HF_DIR` writes a Hugging Face directory"
        )
    return "this is not a model; give a directory with config.json, safetensors and a tokenizer"


def check_adapter_dir(path: Path) -> dict[str, Any]:
    """Content of adapter_config.json.

    Raises ConfigError (no PEFT adapter there) and CheckpointError (a damaged one).
    """
    if not path.is_dir():
        raise ConfigError(f"--adapters {path}: no such directory")
    if not (path / "adapter_config.json").is_file():
        if (path / "COMMIT").is_file() or any(path.glob("checkpoint-*")):
            raise ConfigError(
                f"--adapters {path}: this is a training run or one of its checkpoints, not a PEFT adapter: "
                f"`mswift export --model {path} --output_dir ADAPTER_DIR` writes one"
            )
        raise ConfigError(f"--adapters {path}: no adapter_config.json, so this is not a PEFT adapter")
    if not (path / "adapter_model.safetensors").is_file():
        raise CheckpointError(
            f"--adapters {path}: adapter_config.json without adapter_model.safetensors; "
            f"export the adapter again, or save it with save_pretrained(safe_serialization=True)"
        )
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"--adapters {path}: adapter_config.json is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"--adapters {path}: adapter_config.json is not a JSON object")
    return config
