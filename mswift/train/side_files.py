"""The files of a model directory that are not weights, as a checkpoint carries them in hf/."""

import json
import tempfile
from pathlib import Path
from typing import Any

from mswift.converters.reader import WeightReader
from mswift.data.tokenizer import Tokenizer
from mswift.parallel.engine import EngineSettings
from mswift.tuners.peft_config import CONFIG_FILE, adapter_files

_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def side_files(reader: WeightReader, config: EngineSettings, base_model: str) -> dict[str, bytes]:
    """config.json, generation_config.json and tokenizer files, byte for byte; of a LoRA run adapter_config.json too.

    Only where a full run trains in another dtype than config.json states, its `dtype` (or `torch_dtype`) is changed.
    """
    files = reader.side_files()
    if config.method is not None:
        return files | {CONFIG_FILE: config.method.text(reader.table, config.trainable_modules, base_model)}
    if config.lora is not None:
        return files | adapter_files(reader.table, config.lora.settings, config.trainable_modules, base_model)
    files.pop(CONFIG_FILE, None)  # of an adapter that lies beside the model: it would make this an adapter's checkpoint
    content: dict[str, Any] = json.loads(files["config.json"])
    wanted = _DTYPE_NAMES[config.dtype]
    fields = [name for name in ("dtype", "torch_dtype") if content.get(name) not in (None, wanted)]
    if fields:
        content |= dict.fromkeys(fields, wanted)
        files["config.json"] = (json.dumps(content, indent=2) + "\n").encode()
    return files


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer as transformers saves it, by file name; for one that has new tokens."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
