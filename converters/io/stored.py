"""Model files under Hugging Face names: one file, shards with an index, or shards without one."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath

from mswift.converters.io.side_files import check_link
from mswift.converters.layout import Dim, Piece, merge_bytes
from mswift.converters.named_once import named_once
from mswift.converters.plan import DTYPE_BYTES
from mswift.errors import CheckpointError

LARGEST_INDEX_BYTES = 200_000_000
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, absolute byte offset, strides in elements (None: C order)."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def copy(self, name: str) -> Piece:
        """Map of the bytes of the tensor in C order (side 0) to those of the file (side 1)."""
        if self.strides is None:
            return Piece((name, name), ((0,), (self.offset,)), (Dim(self.nbytes, (0, 0), (1, 1)),))
        item, dims, unit = DTYPE_BYTES[self.dtype], [], DTYPE_BYTES[self.dtype]
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            dims.append((n, unit, stride * item))
            unit *= n
        return Piece((name, name), ((0,), (self.offset,)), merge_bytes([*dims, (item, 1, 1)]))


@dataclass(frozen=True)
class FileFormat:
    """How a kind of model files is named, and what reads the tensors of one."""

    single: str
    index: str
    pattern: str
    read: Callable[[Path], Mapping[str, StoredTensor]]

    def present(self, model_dir: Path) -> bool:
        """Whether the directory has such files."""
        return (model_dir / self.index).exists() or (model_dir / self.single).exists() or bool(self.loose(model_dir))

    def loose(self, model_dir: Path) -> list[str]:
        """Names of the files that count where there is no index: all but an adapter's."""
        return sorted(path.name for path in model_dir.glob(self.pattern) if not path.name.startswith("adapter_"))

    def read_directory(self, model_dir: Path) -> dict[str, StoredTensor]:
        """Every tensor of the one file, of the shards that the index names, or (without index) of all shards.

        CheckpointError on any mismatch.
        """
        index, single = model_dir / self.index, model_dir / self.single
        if index.exists() and single.exists():
            raise CheckpointError(f"{model_dir}: has both {self.single} and {self.index}; remove the one not meant")
        if single.exists():
            _check_inside(model_dir, self.single, single)
            return dict(self.read(single))
        if index.exists():
            return self._read_indexed(model_dir, index)
        return self._read_loose(model_dir)

    def _read_indexed(self, model_dir: Path, index: Path) -> dict[str, StoredTensor]:
        weight_map = read_index(index)
        tensors: dict[str, StoredTensor] = {}
        files = sorted(set(weight_map.values()))
        for file in files:
            _check_inside(model_dir, file, index)
        absent = [file for file in files if not (model_dir / file).exists()]
        if absent:
            verb = "do not exist" if len(absent) > 1 else "does not exist"
            raise CheckpointError(
                f"{index}: names {', '.join(absent[:5])}, which {verb} ({len(absent)} of {len(files)} files)"
            )
        for file in files:
            path = model_dir / file
            for name, tensor in self.read(path).items():
                if weight_map.get(name) != file:
                    said = weight_map.get(name, "no file")
                    raise CheckpointError(f"{path}: holds tensor {name!r}, which the index places in {said}")
                tensors[name] = tensor
        for name, file in weight_map.items():
            if name not in tensors:
                raise CheckpointError(f"{model_dir / file}: lacks tensor {name!r}, which the index places there")
        return tensors

    def _read_loose(self, model_dir: Path) -> dict[str, StoredTensor]:
        files, tensors = self.loose(model_dir), dict[str, StoredTensor]()
        _check_numbers(model_dir, files)
        for file in files:
            _check_inside(model_dir, file, model_dir)
            for name, tensor in self.read(model_dir / file).items():
                if name in tensors:
                    raise CheckpointError(
                        f"{model_dir}: has no {self.index}, and both {tensors[name].path.name} and {file} hold "
                        f"tensor {name!r}; remove the files that are not meant"
                    )
                tensors[name] = tensor
        return tensors


def _check_numbers(model_dir: Path, files: list[str]) -> None:
    """Shards called model-00002-of-00003 must all be there, of one count."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for file in files:
        match = _NUMBERED.fullmatch(file)
        if match:
            found.setdefault((match[1], match[3], match[4]), set()).add(int(match[2]))
    for (stem, count, suffix), numbers in found.items():
        missing = sorted(set(range(1, int(count) + 1)) - numbers)
        if missing:
            name = f"{stem}-{missing[0]:05}-of-{count}{suffix}"
            raise CheckpointError(f"{model_dir}: {len(missing)} of {int(count)} shards are missing: {name}, ...")


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name; CheckpointError if it is no index."""
    try:
        if index.stat().st_size > LARGEST_INDEX_BYTES:
            raise CheckpointError(f"{index}: has {index.stat().st_size:,} bytes; that is no index")
        value = json.loads(index.read_text("utf-8"), object_pairs_hook=named_once)
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not valid JSON ({error})") from None
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map of tensor names to file names")
    check_names(index, weight_map)
    return weight_map


def check_names(path: Path, names: Iterable[str]) -> None:
    """CheckpointError for a name that is not text (half of a surrogate pair)."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"{path}: {name!r:.100} is not the name of a tensor") from None


def _check_inside(model_dir: Path, file: str, index: Path) -> None:
    """Weights lie in the model's directory, or are links into the blobs of their own hub cache."""
    if PurePosixPath(file).name != file or file in ("", ".", "..") or "\0" in file:
        raise CheckpointError(f"{index}: {file!r} is not a plain file name; weights must lie in {model_dir}")
    path = model_dir / file
    try:
        os.fsencode(file)
        check_link(path)
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is not a file")
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a circle of links, a lone surrogate
        raise CheckpointError(f"{index}: {file!r:.100} cannot be opened ({error})") from None
