"""`mswift_manifest.json`: what a conversion moved, tensor by tensor with hashes; written last, it is the commit mark.

Tensors are listed by Hugging Face name in every format, so that the digest of a model does not depend on how its
bytes are laid out: a round trip is proved by equal digests.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from blake3 import blake3

from mswift import __version__
from mswift.converters.io.files import PIECE_BYTES, open_read, read_bytes
from mswift.converters.io.side_files import MANIFEST
from mswift.converters.measured import Measured
from mswift.converters.plan import DTYPE_BYTES
from mswift.errors import CheckpointError

_VERSION = 2
_HASH_MARK = ' "manifest_blake3": '


@dataclass(frozen=True)
class TensorRecord:
    """One HF tensor: its hash and count of infinities and NaNs (None: not taken), and by which rule it lies where.

    decoded: how its bytes were made of the source's, if they are not the same (dequantised, cast).
    """

    dtype: str
    shape: tuple[int, ...]
    blake3: str | None
    non_finite: int | None
    rule: str
    megatron: str
    decoded: str = ""

    @staticmethod
    def of(
        dtype: str, shape: tuple[int, ...], measured: Measured | None, rule: str, megatron: str, decoded: str = ""
    ) -> "TensorRecord":
        """The record of a tensor that was measured, or not."""
        digest, count = (measured.blake3, measured.non_finite) if measured else (None, None)
        return TensorRecord(dtype, shape, digest, count, rule, megatron, decoded)

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def measured(self) -> Measured | None:
        if self.blake3 is None or self.non_finite is None:
            return None
        return Measured(self.blake3, self.non_finite)


@dataclass(frozen=True)
class DroppedRecord:
    """An HF tensor that no model reads; `same_as`: a tensor with equal bytes, from which it comes back."""

    reason: str
    same_as: str | None = None


@dataclass(frozen=True)
class FileRecord:
    """A file of the destination. BLAKE3 covers all of it, or (`frame`) the bytes that belong to no tensor."""

    bytes: int
    blake3: str
    frame: bool = False


@dataclass(frozen=True)
class Manifest:
    """The proof of one conversion; printed by `mswift convert`."""

    source_format: str
    format: str
    model_type: str
    tensors: Mapping[str, TensorRecord]
    dropped: Mapping[str, DroppedRecord] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    seconds: float = 0.0
    ignored_config_fields: Sequence[str] = ()
    config_edits: Mapping[str, Any] = field(default_factory=dict)

    def timed(self, seconds: float) -> "Manifest":
        """The same with the seconds that the conversion took."""
        return replace(self, seconds=seconds)

    @property
    def non_finite(self) -> dict[str, int] | None:
        """How many infinities and NaNs each tensor has that has any; None if they were not counted."""
        counts = {name: t.non_finite for name, t in self.tensors.items()}
        if None in counts.values():
            return None
        return {name: count for name, count in counts.items() if count}

    @property
    def num_elements(self) -> int:
        return sum(t.num_elements for t in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        return sum(t.num_elements * DTYPE_BYTES[t.dtype] for t in self.tensors.values())

    @property
    def digest(self) -> str | None:
        """BLAKE3 over name, dtype, shape and hash of every tensor: the same in every format. None without hashes."""
        if any(t.blake3 is None for t in self.tensors.values()):
            return None
        lines = [f"{n}\0{t.dtype}\0{list(t.shape)}\0{t.blake3}\n" for n, t in sorted(self.tensors.items())]
        return blake3("".join(lines).encode()).hexdigest()

    def __str__(self) -> str:
        lines = [
            f"{self.source_format} -> {self.format}, model_type {self.model_type}: every element moved exactly once",
            f"  tensors   {len(self.tensors):,}",
            f"  elements  {self.num_elements:,}",
            f"  bytes     {self.num_bytes:,}",
            f"  blake3    {self.digest or 'not taken (--hash_source false): only mswift verify A B can compare'}",
            f"  seconds   {self.seconds:.2f}",
        ]
        if self.non_finite:
            lines.append(f"  not finite {sum(self.non_finite.values()):,} {_some(list(self.non_finite))}".rstrip())
        reasons: dict[str, list[str]] = {}
        for name, record in self.dropped.items():
            reasons.setdefault(record.reason, []).append(name)
        for reason, names in reasons.items():
            lines.append(f"  dropped   {len(names)} ({names[0]}{', ...' if len(names) > 1 else ''}): {reason}")
        for name, value in self.config_edits.items():
            lines.append(f"  config    {name} " + ("left out" if value is None else f"is now {json.dumps(value)}"))
        if self.ignored_config_fields:
            lines.append(f"  config    ignored as asked: {', '.join(self.ignored_config_fields)}")
        rules = Counter(t.decoded for t in self.tensors.values() if t.decoded)
        lines += [f"  decoded   {count:,} tensors: {rule}" for rule, count in rules.items()]
        return "\n".join(lines)

    def write(self, directory: Path) -> None:
        """As the last file of the directory, a line for each tensor; its last line is the hash of those before it."""
        digest = blake3()
        with open(directory / MANIFEST, "xb") as file:
            for text in self._text():
                digest.update(text.encode())
                file.write(text.encode())
            file.write(f"{_HASH_MARK}{json.dumps(digest.hexdigest())}\n}}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def _text(self) -> Iterator[str]:
        head = {
            "version": _VERSION,
            "mswift": __version__,
            "source_format": self.source_format,
            "format": self.format,
            "model_type": self.model_type,
            "blake3": self.digest,
            "num_tensors": len(self.tensors),
            "num_elements": self.num_elements,
            "num_bytes": self.num_bytes,
            "seconds": round(self.seconds, 3),
            "ignored_config_fields": list(self.ignored_config_fields),
            "config_edits": dict(self.config_edits),
        }
        yield "{\n" + "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
        records: dict[str, Mapping[str, TensorRecord | DroppedRecord | FileRecord]]
        records = {"tensors": self.tensors, "dropped": self.dropped, "files": self.files}
        for key, named in records.items():
            before = f" {json.dumps(key)}: {{\n"
            for name, record in named.items():
                yield f"{before}  {json.dumps(name)}: {json.dumps(vars(record))}"
                before = ",\n"
            yield f"{'' if named else before}\n }},\n"


def _some(names: Sequence[str]) -> str:
    return f"(in {len(names)} tensors: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a directory that `convert` made, None if it has none; CheckpointError if it is damaged."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        text = path.read_bytes()
        value: dict[str, Any] = json.loads(text)
        if value["version"] != _VERSION:
            raise CheckpointError(f"{path}: version {value['version']}; this mswift reads {_VERSION}")
        tensors = {n: TensorRecord(**{**t, "shape": tuple(t["shape"])}) for n, t in value["tensors"].items()}
        dropped = {n: DroppedRecord(**d) for n, d in value["dropped"].items()}
        files = {n: FileRecord(**f) for n, f in value["files"].items()}
        kinds = (value["source_format"], value["format"], value["model_type"])
        reading = (tuple(value.get("ignored_config_fields", ())), dict(value.get("config_edits", {})))
        manifest = Manifest(*kinds, tensors, dropped, files, value["seconds"], *reading)
        intact = value["manifest_blake3"] == blake3(text[: text.rindex(_HASH_MARK.encode())]).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged ({type(error).__name__}: {error})") from None
    if not intact:
        raise CheckpointError(f"{path}: is damaged: its own hash does not match")
    return manifest


def hash_frame(path: Path, extents: Sequence[tuple[int, int]]) -> FileRecord:
    """Hash of the bytes of a file outside the (offset, size) extents."""
    digest, position = blake3(), 0
    fd = open_read(path)
    try:
        size = os.fstat(fd).st_size
        for offset, length in [*sorted(extents), (size, 0)]:
            while position < offset:
                count = min(PIECE_BYTES, offset - position)
                digest.update(read_bytes(fd, count, position, path))
                position += count
            position = max(position, offset + length)
    finally:
        os.close(fd)
    return FileRecord(size, digest.hexdigest(), frame=True)


def hash_whole(path: Path) -> FileRecord:
    """Hash of a whole file."""
    record = hash_frame(path, [])
    return FileRecord(record.bytes, record.blake3)
