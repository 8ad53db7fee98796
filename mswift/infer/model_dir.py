"""Is this a directory that `mswift infer` can load, and if not, which command makes one of it. Torch-free."""

import json
from pathlib import Path
from typing import Any

from mswift.converters.catalog import what_it_is
from mswift.data.tokenizer import check_tokenizer_files
from mswift.errors import CheckpointError, ConfigError


def check_model_dir(path: Path, flag: str = "--model") -> None:
    """Refuse what is not a Hugging Face model directory with a tokenizer; the message names the remedy.

    Raises ConfigError.
    """
    if not path.is_dir():
        what = "this is a file" if path.exists() else "no such directory"
        raise ConfigError(f"{flag} {path}: {what} (mswift reads local Hugging Face directories)")
    if not (path / "config.json").is_file():
        raise ConfigError(f"{flag} {path}: no config.json; " + what_it_is(path))
    check_tokenizer_files(path, flag)


def check_adapter_dir(path: Path) -> dict[str, Any]:
    """Content of adapter_config.json.

    Raises ConfigError (no PEFT adapter there) and CheckpointError (a damaged one).
    """
    if not path.is_dir():
        what = "this is a file" if path.exists() else "no such directory"
        raise ConfigError(f"--adapters {path}: {what}; give a PEFT directory")
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
