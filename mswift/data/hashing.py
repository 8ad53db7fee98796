"""Hashes of content; those of data files are kept beside the cache, so that an unchanged file is read once.

A kept digest belongs to (path, size, mtime, inode, device, ctime). A program can set a file's mtime back but not its
ctime, so a change with the same size and mtime is found. Times are as coarse as the file system's clock: the digest of
a file that changed less than `_SETTLED_SECONDS` before it was read is not kept, and neither is that of a file that
changed while it was read.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

_SETTLED_SECONDS = 3.0
_MAX_KEPT = 10_000
_PIECE_BYTES = 1 << 20


def content_hash(value: Mapping[str, Any]) -> str:
    """Hex sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Hex blake3 of a file."""
    digest = blake3()
    with path.open("rb") as stream:
        while data := stream.read(_PIECE_BYTES):
            digest.update(data)
    return digest.hexdigest()


class FileHashes:
    """Digests of files by what `stat` says of them, kept in one JSON file; a damaged or foreign one counts as empty."""

    def __init__(self, kept: Path) -> None:
        self._path = kept
        self._known = _load(kept)
        self._changed = False

    def __getitem__(self, path: Path) -> str:
        """Hex blake3 of the file."""
        name, before = str(path.absolute()), _state(path)
        entry = self._known.pop(name, None)
        if entry is not None and entry[:-1] == before:
            self._known[name] = entry  # the last used are kept longest
            return str(entry[-1])
        read_at = time.time_ns()
        digest = file_hash(path)
        self._changed |= entry is not None
        settled = read_at - max(before[1], before[4]) > _SETTLED_SECONDS * 1e9
        if settled and _state(path) == before:
            self._known[name] = [*before, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Write what is new, whole or not at all; a folder that cannot be written is said where tokens are written."""
        if not self._changed:
            return
        newest = dict(list(self._known.items())[-_MAX_KEPT:])
        temporary = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps({"files": newest, "hash": content_hash(newest)}), encoding="utf-8")
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)
        self._changed = False


def _state(path: Path) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev, found.st_ctime_ns]


def _load(path: Path) -> dict[str, list[Any]]:
    try:
        envelope = json.loads(path.read_text(encoding="utf-8"))
        files: dict[str, list[Any]] = envelope["files"]
        return files if content_hash(files) == envelope["hash"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
