"""Hugging Face safetensors directories as byte ranges: strict headers, strict index, in-place writing."""

import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from mswift.converters.io.files import open_read, read_bytes
from mswift.converters.io.stored import FileFormat, StoredTensor, check_names
from mswift.converters.named_once import named_once
from mswift.converters.plan import DTYPE_BYTES
from mswift.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGEST_HEADER_BYTES = 100_000_000
MOST_AXES = 64
_FIELDS = {"dtype", "shape", "data_offsets"}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; CheckpointError naming file, tensor and numbers if it lies."""
    fd = open_read(path)
    try:
        size = os.fstat(fd).st_size
        if size < 8:
            raise CheckpointError(f"{path}: has {size} bytes; a safetensors file has at least 8")
        length = int.from_bytes(read_bytes(fd, 8, 0, path), "little")
        if length > min(size - 8, LARGEST_HEADER_BYTES):
            raise CheckpointError(f"{path}: announces a header of {length} bytes, but the file has {size}")
        raw = read_bytes(fd, length, 8, path)
    finally:
        os.close(fd)
    entries = _parse(raw, path)
    tensors = {name: _entry(path, name, value, 8 + length) for name, value in entries.items() if name != "__metadata__"}
    _check_tiling(path, tensors, 8 + length, size)
    return tensors


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=named_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error})") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(entries).__name__}, not an object")
    check_names(path, entries)
    return entries


def _entry(path: Path, name: str, value: Any, data: int) -> StoredTensor:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise CheckpointError(f"{where}: the header must give {sorted(_FIELDS)}, not {value!r:.200}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r:.100}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: shape {shape!r:.100} or data_offsets {offsets!r:.100} are not sizes")
    expected = prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{where}: {dtype} {shape} needs {expected} bytes, but "
            f"data_offsets {offsets} hold {offsets[1] - offsets[0]}"
        )
    return StoredTensor(dtype, tuple(shape), path, data + offsets[0])


def _sizes(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= MOST_AXES and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
    )


def _check_tiling(path: Path, tensors: Mapping[str, StoredTensor], data: int, size: int) -> None:
    position, before = data, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda t: (t[1].offset, t[1].nbytes)):
        if tensor.offset != position:
            what = "overlaps" if tensor.offset < position else "leaves a gap after"
            raise CheckpointError(
                f"{path}: tensor {name!r} begins at byte {tensor.offset}, but {before} ends at {position}: it {what} it"
            )
        position, before = position + tensor.nbytes, repr(name)
    if position != size:
        raise CheckpointError(
            f"{path}: the header describes {position} bytes, but the file has {size}: "
            + ("it is truncated" if size < position else "it has bytes that no tensor owns")
        )


SAFETENSORS = FileFormat(SINGLE, INDEX, "*.safetensors", read_header)


def read_directory(model_dir: Path) -> dict[str, StoredTensor]:
    """Every tensor of the safetensors files of a directory; CheckpointError on any mismatch."""
    if not SAFETENSORS.present(model_dir):
        raise CheckpointError(f"{model_dir}: has neither {SINGLE} nor {INDEX}")
    return SAFETENSORS.read_directory(model_dir)


def encode_header(tensors: Mapping[str, tuple[str, Sequence[int]]], align: int = 4096) -> tuple[bytes, dict[str, int]]:
    """Header bytes ({"format": "pt"}, padded so that data starts on a page) and each tensor's absolute offset.

    `tensors`: name -> (dtype, shape), in file order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        offsets[name] = position
        position += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % align)
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: data + o for name, o in offsets.items()}
