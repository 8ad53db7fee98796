"""The files of a model directory that are not weights."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from mswift.errors import CheckpointError

MANIFEST = "mswift_manifest.json"
OPTIMIZER_RECORD = "mswift_optimizer.json"
LARGEST_BYTES = 256 << 20
_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".distcp", ".h5", ".msgpack", ".onnx", ".npz"}
)


def carried_files(model_dir: Path) -> list[Path]:
    """config.json, generation_config.json, tokenizer and other files at the top of the directory, sorted by name.

    Left out: weights and their indexes, hidden files, sub-directories, the converter's records.
    """
    files = []
    for path in sorted(model_dir.iterdir()):
        name = path.name
        if (
            name.startswith(".")
            or name in (MANIFEST, OPTIMIZER_RECORD)
            or name.endswith(".index.json")
            or not path.is_file()
        ):
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


def identity_of(folders: Iterable[Path]) -> list[tuple[str, int, str]]:
    """(name, size, time of change or sha256) of all files of a model that a conversion reads, by name.

    Weights are known by their time of change, in nanoseconds; small files by what they hold.
    """
    found = []
    for folder in folders:
        for path in carried_files(folder):
            found.append((path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()))
        for path in sorted(folder.iterdir()):
            if path.is_file() and (
                path.suffix in _WEIGHTS or path.name in (MANIFEST, OPTIMIZER_RECORD) or path.name == ".metadata"
            ):
                found.append((path.name, path.stat().st_size, str(path.stat().st_mtime_ns)))
    return found
