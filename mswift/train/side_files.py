"""The files of a model directory that are not weights, as a checkpoint carries them in hf/."""

import json
from pathlib import Path
from typing import Any

from mswift.converters.io.side_files import carried_files

_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def hf_side_files(source: Path, dtype: str) -> dict[str, bytes]:
    """config.json, generation_config.json and tokenizer files of `source`, byte for byte.

    Only where the run trains in another dtype than config.json states, its `dtype` (or `torch_dtype`) is changed.
    """
    files = {path.name: path.read_bytes() for path in carried_files(source)}
    config: dict[str, Any] = json.loads(files["config.json"])
    wanted = _DTYPE_NAMES[dtype]
    fields = [name for name in ("dtype", "torch_dtype") if config.get(name) not in (None, wanted)]
    if fields:
        for name in fields:
            config[name] = wanted
        files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return files
