"""The files of a model directory that are not weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mswift.errors import CheckpointError

MANIFEST = "mswift_manifest.json"
LARGEST_BYTES = 256 << 20
_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".distcp", ".h5", ".msgpack", ".onnx", ".npz"}
)


def carried_files(model_dir: Path) -> list[Path]:
    """config.json, generation_config.json, tokenizer and other files at the top of the directory, sorted by name.

    Left out: weights and their indexes, hidden files, sub-directories, the converter's manifest.
    """
    files = []
    for path in sorted(model_dir.iterdir()):
        name = path.name
        if name.startswith(".") or name == MANIFEST or name.endswith(".index.json") or not path.is_file():
            continue
        if path.suffix in _WEIGHTS:
            continue
        if path.stat().st_size > LARGEST_BYTES:
            raise CheckpointError(
                f"{path}: {path.stat().st_size:,} bytes is too much for a tokenizer or configuration file "
                f"(at most {LARGEST_BYTES:,}); move it elsewhere"
            )
        files.append(path)
    return files


def edited_json(path: Path, edits: Mapping[str, Any]) -> bytes:
    """A JSON object with other values for some fields; None leaves a field out."""
    value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    value |= edits
    kept = {name: item for name, item in value.items() if not (name in edits and item is None)}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
