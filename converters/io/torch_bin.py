"""`pytorch_model.bin`, as `torch.save` writes a state dict since torch 1.6: read without torch, as byte ranges.

The file is a zip of stored records: a pickle that names the tensors, and one record for each storage. The pickle is
read by an allow-list; nothing in it is run.
"""

import os
import pickle
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from mswift.converters.io.files import open_read, read_bytes
from mswift.converters.io.safe_pickle import PickledTensor, brief, load_state_dict
from mswift.converters.io.stored import FileFormat, StoredTensor, check_names
from mswift.converters.io.torch_item import LARGEST_PICKLE_BYTES, STORAGES, zip_records
from mswift.converters.layout import strides
from mswift.converters.plan import DTYPE_BYTES
from mswift.errors import CheckpointError

_DTYPES = {storage: dtype for dtype, storage in STORAGES.items()}
_BROKEN = (struct.error, KeyError, IndexError, ValueError, TypeError, pickle.UnpicklingError)
_HEADER = b"PK\x03\x04"


def read_pickle(path: Path, load: Any) -> tuple[Any, dict[str, tuple[int, int]]]:
    """(load(its pickle), storage key -> (offset, size)) of a file of torch.save; CheckpointError in words."""
    fd = open_read(path)
    try:
        size = os.fstat(fd).st_size
        if size < 4 or read_bytes(fd, 4, 0, path) != _HEADER:
            raise CheckpointError(
                f"{path}: is not a zip file of torch.save: the format before torch 1.6, another kind of file, or "
                f"damaged. If torch.load reads it, write it anew: torch.save(torch.load({path.name!r}, "
                f"weights_only=True), {path.name!r})"
            )
        records = zip_records(fd, path, 0, size)
        archive = next(iter(records)).split("/", 1)[0] + "/"
        start, length = records[archive + "data.pkl"]
        if length > LARGEST_PICKLE_BYTES:
            raise ValueError(f"its pickle has {length:,} bytes")
        order = records.get(archive + "byteorder")
        if order is not None and read_bytes(fd, min(order[1], 16), order[0], path) != b"little":
            raise ValueError("it was written on a big-endian machine")
        value = load(read_bytes(fd, length, start, path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused: {error}") from None
    except (*_BROKEN, StopIteration, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not what torch.save writes ({type(error).__name__}: {error})") from None
    finally:
        os.close(fd)
    prefix = archive + "data/"
    return value, {name.removeprefix(prefix): place for name, place in records.items() if name.startswith(prefix)}


def read_bin(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict in a file; CheckpointError if it holds anything else, or lies."""
    state, storages = read_pickle(path, load_state_dict)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a state dict of tensors")
    return {_name(path, name): _tensor(path, name, value, storages) for name, value in state.items()}


def _name(path: Path, name: Any) -> str:
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: {brief(name)} is not the name of a tensor")
    check_names(path, [name])
    return name


def _tensor(path: Path, name: str, value: Any, storages: Mapping[str, tuple[int, int]]) -> StoredTensor:
    where = f"{path}: tensor {name!r:.200}"
    if not isinstance(value, PickledTensor):
        raise CheckpointError(
            f"{where}: is a {type(value).__name__}; a model's file holds tensors only. If this is a training "
            "checkpoint, save its model's state_dict() alone"
        )
    dtype, place = _DTYPES.get(value.storage), storages.get(value.key)
    if dtype is None or place is None:
        raise CheckpointError(f"{where}: lies in a {brief(value.storage)} {brief(value.key)}, which the file lacks")
    shape, steps, first = value.shape, value.strides, value.first
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, *steps, first)) or len(shape) != len(steps):
        raise CheckpointError(f"{where}: shape {brief(shape)} or strides {brief(steps)} are not sizes")
    item, (offset, size) = DTYPE_BYTES[dtype], place
    if size != value.numel * item:
        raise CheckpointError(f"{where}: its storage of {value.numel} {dtype} has {size} bytes")
    end = first + (1 + sum((n - 1) * s for n, s in zip(shape, steps, strict=True)) if prod(shape) else 0)
    if end > value.numel:
        raise CheckpointError(f"{where}: reaches element {end} of a storage of {value.numel}")
    _refuse_overlap(where, shape, steps)
    plain = prod(shape) == 0 or all(n == 1 or s == c for n, s, c in zip(shape, steps, strides(shape), strict=True))
    return StoredTensor(dtype, shape, path, offset + first * item, None if plain else steps)


def _refuse_overlap(where: str, shape: tuple[int, ...], steps: tuple[int, ...]) -> None:
    reach = 1
    for step, n in sorted((s, n) for s, n in zip(steps, shape, strict=True) if n > 1):
        if step < reach:
            raise CheckpointError(
                f"{where}: shape {list(shape)} with strides {list(steps)} uses elements twice (an expanded tensor); "
                "save it .contiguous()"
            )
        reach = step * n


TORCH_BIN = FileFormat("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin", read_bin)
