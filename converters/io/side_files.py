"""The files of a model directory that are not weights."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mswift.converters.catalog import IGNORED_FIELDS
from mswift.errors import CheckpointError

MANIFEST = "mswift_manifest.json"
OPTIMIZER_RECORD = "mswift_optimizer.json"
LARGEST_BYTES = 256 << 20
_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".distcp", ".h5", ".msgpack", ".onnx", ".npz"}
)


def carried_files(model_dir: Path) -> list[Path]:
    """config.json, generation_config.json, tokenizer and other files at the top of the directory, sorted by name.

    A file instead of a directory is that file.

    Left out: weights and their indexes, hidden files, sub-directories, the converter's records.
    """
    files = []
    for path in _inside(model_dir):
        name = path.name
        if (
            name.startswith(".")
            or name in (MANIFEST, OPTIMIZER_RECORD, IGNORED_FIELDS)
            or name.endswith(".index.json")
            or not path.is_file()
        ):
            continue
        if path.suffix in _WEIGHTS:
            continue
        check_link(path)
        if path.stat().st_size > LARGEST_BYTES:
            raise CheckpointError(
                f"{path}: {path.stat().st_size:,} bytes is too much for a tokenizer or configuration file "
                f"(at most {LARGEST_BYTES:,}); move it elsewhere"
            )
        files.append(path)
    return files


def check_link(path: Path) -> None:
    """CheckpointError for a link that leads out of its directory, other than into the blobs of a hub cache."""
    if path.is_symlink():
        try:
            target, home = path.resolve(), path.parent.resolve()
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: is a link that leads nowhere ({error})") from None
        if target.parent not in (home, home.parent.parent / "blobs"):
            raise CheckpointError(f"{path}: is a link to {target}, outside {path.parent}; put the file itself there")


def _inside(folder: Path) -> list[Path]:
    return [folder] if folder.is_file() else sorted(folder.iterdir())


def edited_json(path: Path, edits: Mapping[str, Any]) -> bytes:
    """A JSON object with other values for some fields; None leaves a field out."""
    value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    value |= edits
    kept = {name: item for name, item in value.items() if not (name in edits and item is None)}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def identity_of(folders: Iterable[Path]) -> list[tuple[str, int, str]]:
    """(name, size, time of change or sha256) of all files of a model that a conversion reads, by name.

    Weights are known by their path and times of change, in nanoseconds; small files by what they hold.
    """
    found = []
    for folder in folders:
        for path in carried_files(folder):
            with open(path, "rb") as file:
                found.append((path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()))
        for path in _inside(folder):
            if path.is_file() and (
                path.suffix in _WEIGHTS
                or path.name in (MANIFEST, OPTIMIZER_RECORD, ".metadata")
                or path.name.endswith(".index.json")
            ):
                state = path.stat()
                found.append((str(path.resolve()), state.st_size, f"{state.st_mtime_ns} {state.st_ctime_ns}"))
    return found
