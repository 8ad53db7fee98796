"""One tensor as `torch.save` writes it: a zip envelope around raw little-endian bytes, made and parsed without torch.

An item is `prefix | raw C-order bytes | suffix`. Records are stored, never compressed; the data record starts at a
multiple of 64. The CRC of the data record is 0, which torch.load ignores (torch itself writes 0 when its crc32
option is off), so the bytes can be written in any order. Layout measured against torch 2.13 and megatron-core 0.16.1.
"""

import os
import pickle
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from mswift.converters.io.files import read_bytes
from mswift.converters.io.pickle_writer import PickleWriter
from mswift.converters.io.safe_pickle import PickledTensor, brief, load_pickle
from mswift.converters.layout import strides
from mswift.converters.plan import DTYPE_BYTES
from mswift.errors import CheckpointError

LARGEST_ITEM_BYTES = 1 << 30
"""Larger tensors are stored as several chunks (zip records end at 4 GiB)."""

LARGEST_PICKLE_BYTES = 256 << 20
"""No list of records or tensors is larger."""

STORAGES = {
    "BOOL": "BoolStorage", "U8": "ByteStorage", "I8": "CharStorage", "I16": "ShortStorage", "I32": "IntStorage",
    "I64": "LongStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "F32": "FloatStorage",
    "F64": "DoubleStorage",
}  # fmt: skip

_LOCAL, _DESCRIPTOR, _CENTRAL = 0x04034B50, 0x08074B50, 0x02014B50
_END64, _LOCATOR64, _END = 0x06064B50, 0x07064B50, 0x06054B50
_FLAGS = 0x808  # UTF-8 names, sizes in the descriptor after the data


class _Zip:
    """Appends records; the data record is a hole that splits the bytes into prefix and suffix."""

    def __init__(self) -> None:
        self.parts = [bytearray()]
        self._position = 0
        self._central = bytearray()
        self._count = 0

    def _write(self, data: bytes) -> None:
        self.parts[-1] += data
        self._position += len(data)

    def record(self, name: str, data: bytes | int) -> None:
        """`data`: the bytes, or the size of a hole."""
        hole = isinstance(data, int)
        size = data if isinstance(data, int) else len(data)
        crc = 0 if isinstance(data, int) else zlib.crc32(data)
        full, start = f"archive/{name}".encode(), self._position
        pad = -(start + 34 + len(full)) % 64
        extra = b"FB" + struct.pack("<H", pad) + b"Z" * pad
        self._write(struct.pack("<IHHHHHIIIHH", _LOCAL, 0, _FLAGS, 0, 0, 0, 0, 0, 0, len(full), len(extra)))
        self._write(full + extra)
        if hole:
            self.parts.append(bytearray())
            self._position += size
        else:
            self._write(bytes(data))
        self._write(struct.pack("<IIII", _DESCRIPTOR, crc, size, size))
        self._central += struct.pack(
            "<IHHHHHHIIIHHHHHII",
            *(_CENTRAL, 0, 0, _FLAGS, 0, 0, 0, crc, size, size, len(full), 0, 0, 0, 0, 0, start),
        )
        self._central += full
        self._count += 1

    def close(self) -> tuple[bytes, ...]:
        start, size, n = self._position, len(self._central), self._count
        self._write(bytes(self._central))
        end64 = self._position
        self._write(struct.pack("<IQHHIIQQQQ", _END64, 44, 0x031E, 45, 0, 0, n, n, size, start))
        self._write(struct.pack("<IIQI", _LOCATOR64, 0, end64, 1))
        self._write(struct.pack("<IHHHHIIH", _END, 0, 0, n, n, size, start, 0))
        return tuple(map(bytes, self.parts))


def _envelope(pickled: bytes, data_bytes: int | None) -> tuple[bytes, ...]:
    archive = _Zip()
    archive.record("data.pkl", pickled)
    archive.record(".format_version", b"1")
    archive.record(".storage_alignment", b"64")
    archive.record("byteorder", b"little")
    if data_bytes is not None:
        archive.record("data/0", data_bytes)
    archive.record("version", b"3\n")
    archive.record(".data/serialization_id", b"0" * 40)
    return archive.close()


@lru_cache(maxsize=256)
def tensor_envelope(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """(prefix, suffix) of the item that holds a contiguous CPU tensor; `torch.load` reads prefix + bytes + suffix."""
    numel = prod(shape)
    pickler = PickleWriter()
    pickler.rebuild_tensor(STORAGES[dtype], numel, shape, strides(shape))
    prefix, suffix = _envelope(pickler.close(), numel * DTYPE_BYTES[dtype])
    return prefix, suffix


def object_item(value: Any) -> bytes:
    """`torch.save` of plain Python (None, dict, list, int, str)."""
    pickler = PickleWriter()
    pickler.plain(value)
    (data,) = _envelope(pickler.close(), None)
    return data


def locate_data(fd: int, path: Path, offset: int, length: int, dtype: str, shape: Sequence[int], name: str) -> int:
    """Absolute position of the raw bytes of the tensor stored as an item at `offset`; CheckpointError if it is not
    a contiguous tensor of that dtype and shape.
    """
    where = f"{path}: tensor {name!r}, item at byte {offset}"
    size = os.fstat(fd).st_size
    if offset < 0 or length < 22 or offset + length > size:
        raise CheckpointError(f"{where}: {length} bytes do not lie in the file of {size} bytes; it is truncated")
    prefix, _ = tensor_envelope(dtype, tuple(shape))
    data_bytes = prod(shape) * DTYPE_BYTES[dtype]
    if length >= len(prefix) + data_bytes and read_bytes(fd, len(prefix), offset, path) == prefix:
        return offset + len(prefix)
    try:
        return _locate_foreign(fd, path, offset, length, dtype, tuple(shape))
    except (struct.error, KeyError, IndexError, ValueError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{where}: is not a {dtype} tensor of shape {list(shape)} ({error})") from None


def _locate_foreign(fd: int, path: Path, offset: int, length: int, dtype: str, shape: tuple[int, ...]) -> int:
    records = zip_records(fd, path, offset, length)
    archive = next(iter(records)).split("/", 1)[0]
    start, size = records[f"{archive}/data.pkl"]
    if size > LARGEST_PICKLE_BYTES:
        raise ValueError(f"its pickle has {size:,} bytes")
    stored = load_pickle(read_bytes(fd, size, start, path))
    if not isinstance(stored, PickledTensor) or not _holds(stored, dtype, shape):
        raise ValueError(f"it holds {brief(stored)}")
    start, size = records[f"{archive}/data/{stored.key}"]
    if size != prod(shape) * DTYPE_BYTES[dtype] or start + size > offset + length:
        raise ValueError(f"its data record has {size} bytes")
    return start


def _holds(stored: PickledTensor, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether it is the whole of its storage, in C order."""
    steps = all(n == 1 or s == c for n, s, c in zip(shape, stored.strides, strides(shape), strict=False))
    return (*stored[:1], *stored[2:5]) == (STORAGES[dtype], prod(shape), 0, shape) and steps


def zip_records(fd: int, path: Path, offset: int, length: int) -> dict[str, tuple[int, int]]:
    """Name -> (absolute position of the data, size) of every record of the zip at [offset, offset + length).

    ValueError, struct.error or IndexError if it is no zip of stored records that lie apart.
    """
    count = min(length, 4096)
    tail = read_bytes(fd, count, offset + length - count, path)
    end = tail.rindex(struct.pack("<I", _END))
    n, size, start = struct.unpack_from("<HII", tail, end + 10)
    if 0xFFFFFFFF in (size, start) or n == 0xFFFF:
        end64 = tail.rindex(struct.pack("<I", _END64))
        n, size, start = struct.unpack_from("<QQQ", tail, end64 + 32)
    if start + size > length or size > LARGEST_PICKLE_BYTES:
        raise ValueError("its zip directory lies outside the item")
    directory, position, records = read_bytes(fd, size, offset + start, path), 0, dict[str, tuple[int, int]]()
    for _ in range(n):
        (method,) = struct.unpack_from("<H", directory, position + 10)
        packed, stored, names, extras, comments = struct.unpack_from("<IIHHH", directory, position + 20)
        (header,) = struct.unpack_from("<I", directory, position + 42)
        name = directory[position + 46 : position + 46 + names].decode()
        extra = directory[position + 46 + names : position + 46 + names + extras]
        if method != 0 or packed != stored or name in records:
            raise ValueError(f"its record {name!r:.80} is compressed or there twice")
        stored, header = _zip64(extra, stored, header)
        if header + 30 > length:
            raise ValueError(f"its record {name!r:.80} lies outside the item")
        a, b = struct.unpack("<HH", read_bytes(fd, 4, offset + header + 26, path))
        if header + 30 + a + b + stored > length:
            raise ValueError(f"its record {name!r:.80} lies outside the item")
        records[name] = (offset + header + 30 + a + b, stored)
        position += 46 + names + extras + comments
    for (first, size), (second, _) in pairwise(sorted(records.values())):
        if first + size > second:
            raise ValueError(f"its records overlap at byte {second}")
    return records


def _zip64(extra: bytes, size: int, header: int) -> tuple[int, int]:
    """Replaces 0xFFFFFFFF by the 64-bit values of the zip64 extra field (order: size, compressed size, header)."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            values = list(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            if size == 0xFFFFFFFF:
                size = values.pop(0)
                values.pop(0)  # compressed size, equal: records are stored
            if header == 0xFFFFFFFF:
                header = values.pop(0)
        position += 4 + length
    return size, header
