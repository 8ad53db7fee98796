"""What adapter_config.json says of X-LoRA: of a checkpoint; of a directory, with a folder for each LoRA. No torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mswift.converters.io.safetensors import read_header
from mswift.errors import ConfigError
from mswift.tuners.peft_config import CONFIG_FILE, PREFIX, WEIGHTS_FILE, parse_peft_config, read_adapter_json
from mswift.tuners.xlora import (
    BOOKKEEPING,
    FIELDS,
    LORAS,
    PEFT_TYPE,
    XloraConfig,
    check_pairs,
    checked_fields,
    json_text,
)


def is_xlora(data: Mapping[str, Any]) -> bool:
    """Whether the content of an adapter_config.json is of X-LoRA."""
    return data.get("peft_type") == PEFT_TYPE


def parse_xlora(data: Mapping[str, Any], path: Path, seed: int = 0) -> XloraConfig:
    """The content of such an adapter_config.json, of a checkpoint or of a directory; ConfigError for what is not known.

    path: of the file, beside which a directory's LoRAs lie.
    """
    known = {*FIELDS, *BOOKKEEPING, "adapters", "hidden_size", LORAS, "peft_type"}
    for name, value in data.items():
        if value and name not in known:
            raise ConfigError(f"{path}: {name}={value!r} is not supported by mswift for {PEFT_TYPE}")
    hidden_size = data.get("hidden_size")
    if type(hidden_size) is not int or hidden_size < 1:
        raise ConfigError(f"{path}: hidden_size {hidden_size!r} must be a number")
    given = {name: data[name] for name in FIELDS if data.get(name) is not None}
    fields = checked_fields(given, f"{path}: ")
    if LORAS in data:
        loras = [parse_peft_config(each, path) for each in data[LORAS]]
    else:
        folders = lora_folders(data, path)
        loras = [parse_peft_config(read_adapter_json(folder), folder / CONFIG_FILE) for folder in folders]
    check_pairs(fields, {}, len(loras), f"{path}: ")
    return XloraConfig(fields, tuple(loras), hidden_size, seed)


def lora_folders(data: Mapping[str, Any], path: Path) -> list[Path]:
    """Where the LoRAs of a directory lie: in folders of their number beside its file, or where that says they are."""
    named = data.get("adapters")
    if not isinstance(named, dict) or not named or set(named) != {str(number) for number in range(len(named))}:
        raise ConfigError(f"{path}: adapters={named!r}: the LoRAs must be named 0, 1, ..., as PEFT computes them")
    folders = []
    for number in range(len(named)):
        beside, told = path.parent / str(number), Path(str(named[str(number)]))
        found = next((folder for folder in (beside, told) if _is_whole(folder)), None)
        if found is None:
            raise ConfigError(
                f"{path}: LoRA {number} lies neither in {beside} nor in {told}: put its PEFT directory into {beside}"
            )
        folders.append(found)
    return folders


def _is_whole(folder: Path) -> bool:
    """Whether there is a LoRA, and not parts of base and classifier, which PEFT writes there for an X-LoRA."""
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        return False
    names = list(read_header(folder / WEIGHTS_FILE))
    return bool(names) and all(name.startswith(PREFIX) for name in names)


def directory_configs(config: bytes, destination: Path) -> dict[str, bytes]:
    """Path in `destination` -> the adapter_config.json there, from that of a checkpoint; PEFT wants absolute paths."""
    content = json.loads(config)
    if not is_xlora(content):
        return {CONFIG_FILE: config}
    loras = content.pop(LORAS)
    folders = {str(number): str(destination.absolute() / str(number)) for number in range(len(loras))}
    base = {"base_model_name_or_path": content["base_model_name_or_path"]}
    files = {f"{number}/{CONFIG_FILE}": json_text(lora | base) for number, lora in zip(folders, loras, strict=True)}
    return files | {CONFIG_FILE: json_text(content | {"adapters": folders})}
