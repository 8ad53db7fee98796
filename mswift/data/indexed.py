"""megatron-core's IndexedDataset: PREFIX.idx and PREFIX.bin, documents that are tokens already, mapped into memory.

The .idx file, little-endian: "MMIDIDX", two zero bytes; version 1 (uint64); code of the tokens' dtype (uint8); number
of sequences and number of document bounds (uint64 each); lengths of the sequences (int32); where each starts in the
.bin file, in bytes (int64); the first sequence of each document, and the end (int64). A data set of several modes has
an int8 a sequence after that, and is not text. Source: megatron/core/datasets/indexed_dataset.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mswift.data.apart import Apart
from mswift.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("dtype", "u1"), ("sequences", "<u8"), ("bounds", "<u8")])
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_REMEDY = "copy it again, or write it again with Megatron-LM's tools/preprocess_data.py"
_CHUNK = 1 << 24


@dataclass(frozen=True)
class IndexedFile:
    """An open pair of files; the arrays are read-only maps of them."""

    prefix: str
    tokens: NDArray[np.integer[Any]]
    """[tokens], in the dtype of the file: all documents in their order."""
    lengths: NDArray[np.int32]
    """int32 [sequences]"""
    pointers: NDArray[np.int64]
    """int64 [sequences]; byte in the .bin file."""
    documents: NDArray[np.int64]
    """int64 [documents + 1]; the first sequence of each, and the end."""

    @property
    def paths(self) -> tuple[Path, Path]:
        """The .bin and the .idx file."""
        return _path(self.prefix, ".bin"), _path(self.prefix, ".idx")

    def check(self) -> None:
        """DataError unless the sequences lie one behind the other from the first byte to the last, in documents."""
        path, item = self.paths[1], self.tokens.dtype.itemsize
        if (negative := np.flatnonzero(self.lengths < 0)).size:
            raise _damaged(path, f"sequence {negative[0]:,} has {self.lengths[negative[0]]} tokens")
        at = 0
        for first in range(0, len(self.lengths), _CHUNK):
            ends = at + np.cumsum(self.lengths[first : first + _CHUNK], dtype=np.int64) * item
            starts = np.concatenate([[at], ends[:-1]])
            found = self.pointers[first : first + _CHUNK]
            if (wrong := np.flatnonzero(found != starts)).size:
                row = int(wrong[0])
                raise _damaged(path, f"sequence {first + row:,} starts at byte {found[row]:,}, not at {starts[row]:,}")
            at = int(ends[-1])
        if at != self.tokens.nbytes:
            raise _damaged(path, f"it has {at:,} bytes of tokens, {self.paths[0].name} has {self.tokens.nbytes:,}")
        bounds = self.documents
        if bounds[0] != 0 or bounds[-1] != len(self.lengths):
            raise _damaged(
                path,
                f"its documents go from sequence {bounds[0]:,} to {bounds[-1]:,}, the sequences from 0 to "
                f"{len(self.lengths):,} (was the last document ended?)",
            )
        if (wrong := np.flatnonzero(np.diff(bounds) < 0)).size:
            row = int(wrong[0])
            raise _damaged(path, f"document {row:,} ends at sequence {bounds[row + 1]:,} and begins at {bounds[row]:,}")

    def ends(self) -> NDArray[np.int64]:
        """Where each document ends, in tokens; int64 [documents]."""
        bytes_before = np.append(self.pointers, self.tokens.nbytes)
        return bytes_before[self.documents[1:]] // self.tokens.dtype.itemsize

    def document(self, index: int) -> NDArray[np.integer[Any]]:
        """The tokens of one document."""
        item = self.tokens.dtype.itemsize
        sequences = self.documents[index : index + 2].tolist()
        start, stop = (self.tokens.nbytes if n == len(self.pointers) else int(self.pointers[n]) for n in sequences)
        return self.tokens[start // item : stop // item]

    def largest_token(self) -> int:
        """The largest id of all. DataError for a negative one."""
        largest = -1
        for first in range(0, len(self.tokens), _CHUNK):
            piece = self.tokens[first : first + _CHUNK]
            if (least := int(piece.min())) < 0:
                at = first + int(piece.argmin())
                raise DataError(f"{self.paths[0]}: token {at:,} is {least}, and ids are from 0; {_REMEDY}")
            largest = max(largest, int(piece.max()))
        return largest


def open_indexed(prefix: str, flag: str) -> IndexedFile:
    """Map PREFIX.bin and PREFIX.idx; sizes are checked, `IndexedFile.check` reads the rest. DataError names a file."""
    path, data = _path(prefix, ".idx"), _path(prefix, ".bin")
    for file in (path, data):
        if not file.is_file():
            stem = str(Path(prefix).with_suffix(""))
            hint = f": leave the suffix out, {stem}" if Path(prefix).suffix in (".bin", ".idx") else ""
            raise DataError(f"{flag} {prefix}: there is no file {file}{hint or _nearest(file)}")
    if (size := path.stat().st_size) < _HEADER.itemsize:
        raise _damaged(path, f"it has {size} bytes, its header alone has {_HEADER.itemsize}")
    raw = path.open("rb").read(_HEADER.itemsize)
    header = np.frombuffer(raw, _HEADER)[0]
    if raw[: len(_MAGIC)] != _MAGIC:
        raise DataError(f"{path}: it begins with {raw[:9]!r}, an index of megatron-core with {_MAGIC!r}; {_REMEDY}")
    if header["version"] != 1:
        raise DataError(f"{path}: version {header['version']} of the format, and 1 is read; {_REMEDY}")
    if (name := _DTYPES.get(int(header["dtype"]))) is None:
        raise _damaged(path, f"{header['dtype']} is the code of no dtype (they are 1 to {max(_DTYPES)})")
    dtype = np.dtype(name)
    if dtype.kind == "f":
        raise DataError(f"{path}: its items are {dtype.name}, and token ids are whole numbers; {_REMEDY}")
    sequences, bounds = int(header["sequences"]), int(header["bounds"])
    wanted = _HEADER.itemsize + sequences * (4 + 8) + bounds * 8
    if size == wanted + sequences and sequences:
        raise DataError(f"{path}: a data set of several modes (multimodal), and text is read; write it without modes")
    if size != wanted:
        raise _damaged(path, f"it has {size:,} bytes, with {sequences:,} sequences, {bounds:,} bounds: {wanted:,}")
    if sequences == 0 or bounds < 2 or not data.stat().st_size:
        raise DataError(f"{flag} {prefix}: it holds no tokens; leave it out")
    if data.stat().st_size % dtype.itemsize:
        raise _damaged(data, f"it has {data.stat().st_size:,} bytes, and {dtype.name} takes {dtype.itemsize}")
    at = np.cumsum([_HEADER.itemsize, sequences * 4, sequences * 8]).tolist()
    found = IndexedFile(
        prefix,
        np.memmap(data, dtype, "r"),
        np.memmap(path, np.dtype("<i4"), "r", at[0], (sequences,)),
        np.memmap(path, np.dtype("<i8"), "r", at[1], (sequences,)),
        np.memmap(path, np.dtype("<i8"), "r", at[2], (bounds,)),
    )
    end = int(found.pointers[-1]) + int(found.lengths[-1]) * dtype.itemsize
    if end != found.tokens.nbytes:
        raise _damaged(data, f"it has {found.tokens.nbytes:,} bytes, {path.name} says {end:,}")
    return found


class JoinedTokens:
    """The streams of several files, one behind the other; what is read is int32."""

    def __init__(self, parts: Sequence[NDArray[np.integer[Any]]]) -> None:
        self._parts = [Apart(part) for part in parts]
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, where: slice, /) -> NDArray[np.int32]:
        start, stop, _ = where.indices(len(self))
        pieces = [
            part[max(start - end + len(part), 0) : stop - end + len(part)]
            for part, end in zip(self._parts, self._ends, strict=True)
            if end > start and end - len(part) < stop
        ]
        return np.concatenate(pieces, dtype=np.int32, casting="unsafe") if pieces else np.empty(0, dtype=np.int32)


def _path(prefix: str, suffix: str) -> Path:
    return Path(f"{Path(prefix).expanduser()}{suffix}")


def _nearest(file: Path) -> str:
    found = sorted(other.stem for other in file.parent.glob("*.idx")) if file.parent.is_dir() else []
    return f"; prefixes there: {', '.join(found[:5])}" if found else "; PREFIX.bin and PREFIX.idx belong together"


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}: the file is damaged or cut short; {_REMEDY}")
