"""megatron-core's `torch_dist` checkpoints as bytes: read any region, write one rank's file, index a directory."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from threading import local
from typing import Any

from blake3 import blake3

from mswift.converters.io.dcp_metadata import METADATA, Index, Item, encode_metadata, read_metadata
from mswift.converters.io.descriptors import Descriptors
from mswift.converters.io.files import PIECE_BYTES, sync_directory, write_file
from mswift.converters.io.strided import gather
from mswift.converters.io.torch_item import LARGEST_ITEM_BYTES, locate_data, object_item, tensor_envelope
from mswift.converters.layout import Chunks, Region, flatten, identity, tiling_fault
from mswift.converters.plan import DTYPE_BYTES
from mswift.errors import CheckpointError

PAGE_BYTES = 4096
OBJECTS = "__objects.distcp"
BACKEND = "metadata.json"
COMMON = "common.pt"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_LINEAR = re.compile(
    r"(?P<module>(decoder\.layers\.(?P<layer>\d+\.)?|mtp\.layers\.(?P<mtp>\d+\.))(.*\.)?"
    r"(linear_qkv|linear_proj|linear_fc1|linear_fc2|in_proj|out_proj|linear_in|linear_out|eh_proj|linear_q_proj|"
    r"linear_q_down_proj|linear_q_up_proj|linear_kv_down_proj|linear_kv_up_proj))\.weight(\.\w+)?"
)
_LAYERS, _NORM, _ROUTER = "decoder.layers.", "mlp.linear_fc1.layer_norm_weight", "mlp.router.weight"
_MAMBA_MODEL_NORM = "decoder.final_norm.weight"


@dataclass(frozen=True)
class TensorInfo:
    """A global tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str


class TorchDistSource:
    """Reads regions of the tensors of a torch_dist directory, whatever chunks it was written in. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._open = Descriptors()
        self.path = Path(path)
        self._index = read_metadata(self.path)
        for key in list(self._index.tensors):
            name = other_name(key)
            if name in self._index.tensors and self._index.tensors.pop(name) != self._index.tensors[key]:
                raise CheckpointError(f"{self.path / METADATA}: {name} and {key} are one norm, but other bytes")
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(shape, dtype) for name, (dtype, shape, _) in self._index.tensors.items()
        }
        self.objects = tuple(self._index.objects)
        self.bytes_read = 0
        self._data: dict[tuple[str, Region], int] = {}
        self._chunks: dict[str, Chunks] = {}
        self._scratch = local()

    @property
    def is_megatron(self) -> bool:
        """Whether megatron-core's dist_checkpointing (or mswift) wrote it, not torch.distributed.checkpoint alone."""
        return (self.path / BACKEND).is_file() or any("decoder." in name for name in self.tensors)

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names: old -> new."""
        for old, new in names.items():
            self._index.tensors[new] = self._index.tensors.pop(old)
        self.tensors = {names.get(name, name): info for name, info in self.tensors.items()}

    def close(self) -> None:
        """Closes the files."""
        self._open.close()

    def __del__(self) -> None:
        self.close()

    def chunks(self, name: str) -> Chunks:
        """The stored chunks of a tensor; CheckpointError unless they tile it."""
        found = self._chunks.get(name)
        if found is None:
            _, shape, chunks = self._entry(name)
            fault = tiling_fault(list(chunks), shape)
            if fault is not None:
                raise CheckpointError(f"{self.path / METADATA}: chunks of {name} of shape {list(shape)}: {fault}")
            found = self._chunks[name] = Chunks(list(chunks))
        return found

    def chunk_data(self, name: str, chunk: Region) -> tuple[Path, int]:
        """(path, byte offset) of a chunk's raw C-order bytes."""
        dtype, _, chunks = self._entry(name)
        item = chunks[chunk]
        path = self.path / item.file
        start = self._data.get((name, chunk))
        if start is None:
            with self._open.held([path]) as fds:
                start = locate_data(fds[path], path, item.offset, item.length, dtype, chunk.sizes, name)
            self._data[name, chunk] = start
        return path, start

    def read(self, name: str, region: Region, out: memoryview) -> None:
        """Fills `out` with the C-order bytes of the region; CheckpointError names file and tensor."""
        dtype, shape, _ = self._entry(name)
        item_bytes = DTYPE_BYTES[dtype]
        out = out.cast("B")
        if len(out) != region.num_elements * item_bytes:
            raise ValueError(f"{name}{region}: {len(out)} bytes given, {region.num_elements * item_bytes} needed")
        if region.intersect(Region.full(shape)) != region:
            raise CheckpointError(f"{self.path}: {name} has shape {list(shape)}; {region} lies outside")
        for chunk, common in self.chunks(name).overlapping(region):
            starts = (_minus(common.offsets, region.offsets), _minus(common.offsets, chunk.offsets))
            copy = flatten(identity((name, name), common, starts), (region.sizes, chunk.sizes), item_bytes)
            path, start = self.chunk_data(name, chunk)
            with self._open.held([path]) as fds:
                self.bytes_read += gather(fds[path], path, copy.moved(1, start), out, 0, self._tile())

    def _tile(self) -> memoryview:
        tile = getattr(self._scratch, "tile", None)
        if tile is None:
            tile = self._scratch.tile = memoryview(bytearray(PIECE_BYTES))
        return tile

    def _entry(self, name: str) -> tuple[str, tuple[int, ...], dict[Region, Item]]:
        try:
            return self._index.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}") from None


def _minus(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x - y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class StoredChunk:
    """One chunk of a global tensor and the bytes of its item in the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    region: Region
    offset: int
    length: int


@dataclass(frozen=True)
class WrittenFile:
    """A finished file of a checkpoint: what its COMMIT needs, and what the index needs."""

    name: str
    size: int
    blake3: str
    chunks: tuple[StoredChunk, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; ranks gather these."""
        chunks = [
            [c.key, c.dtype, list(c.shape), list(c.region.offsets), list(c.region.sizes), c.offset, c.length]
            for c in self.chunks
        ]
        return {"name": self.name, "size": self.size, "blake3": self.blake3, "chunks": chunks}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> "WrittenFile":
        """Inverse of as_dict."""
        chunks = tuple(
            StoredChunk(key, dtype, tuple(shape), Region(tuple(offsets), tuple(sizes)), offset, length)
            for key, dtype, shape, offsets, sizes, offset, length in value["chunks"]
        )
        return WrittenFile(value["name"], value["size"], value["blake3"], chunks)


class ShardWriter:
    """Appends one rank's chunks to its own file; the hash is taken from the buffer before it is written."""

    def __init__(self, directory: Path, file_name: str) -> None:
        self._name = file_name
        self._file = open(Path(directory) / file_name, "xb", buffering=0)  # noqa: SIM115  (closed by close)
        self._hash = blake3()
        self._position = 0
        self._chunks: list[StoredChunk] = []

    def add(self, key: str, dtype: str, shape: tuple[int, ...], region: Region, data: memoryview) -> None:
        """Stores the C-order bytes of `region` of the global tensor `key` of that dtype and shape."""
        data = data.cast("B")
        expected = region.num_elements * DTYPE_BYTES[dtype]
        if len(data) != expected or region.intersect(Region.full(shape)) != region:
            raise ValueError(f"{key}: {region} of {list(shape)} {dtype} takes {expected} bytes, got {len(data)}")
        for part, first, last in _items(region, DTYPE_BYTES[dtype]):
            prefix, suffix = tensor_envelope(dtype, part.sizes)
            if last - first >= PIECE_BYTES:
                self._write(memoryview(bytes(-(self._position + len(prefix)) % PAGE_BYTES)))
            start = self._position
            for piece in (memoryview(prefix), data[first:last], memoryview(suffix)):
                self._write(piece)
            self._chunks.append(StoredChunk(key, dtype, tuple(shape), part, start, self._position - start))

    def _write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            piece = data[done : done + PIECE_BYTES]
            self._hash.update(piece)
            sent = 0
            while sent < len(piece):
                sent += self._file.write(piece[sent:]) or 0
            done += len(piece)
        self._position += len(data)

    def close(self) -> WrittenFile:
        """Flushes to disk."""
        os.fsync(self._file.fileno())
        self._file.close()
        return WrittenFile(self._name, self._position, self._hash.hexdigest(), tuple(self._chunks))


def split_region(region: Region, item_bytes: int, limit: int = LARGEST_ITEM_BYTES) -> list[Region]:
    """Cuts a region along its first axis longer than 1 into parts of at most `limit` bytes, contiguous in C order."""
    total = region.num_elements * item_bytes
    axis = next((a for a, n in enumerate(region.sizes) if n > 1), None)
    if total <= limit or axis is None:
        return [region]
    row = total // region.sizes[axis]
    step = max(1, limit // row)
    parts = []
    for first in range(0, region.sizes[axis], step):
        offsets, sizes = list(region.offsets), list(region.sizes)
        offsets[axis] += first
        sizes[axis] = min(step, region.sizes[axis] - first)
        parts += split_region(Region(tuple(offsets), tuple(sizes)), item_bytes, limit)
    return parts


def _items(region: Region, item_bytes: int) -> list[tuple[Region, int, int]]:
    parts, position = [], 0
    for part in split_region(region, item_bytes):
        size = part.num_elements * item_bytes
        parts.append((part, position, position + size))
        position += size
    return parts


def write_index(directory: Path, files: Sequence[WrittenFile]) -> list[WrittenFile]:
    """Makes the directory a torch_dist checkpoint of the files' chunks; returns the files it wrote, fsynced.

    CheckpointError unless the chunks of every tensor tile it and agree on dtype and shape. Layers' `_extra_state`
    objects (empty), which megatron-core's local spec asks for, are added where weights of layers are present.
    """
    index = Index()
    _extend(index, Path(directory), files)
    return write_index_files(Path(directory), index)


def rewrite_index(directory: Path, index: Index, files: Sequence[WrittenFile]) -> None:
    """The same for files that were added to a directory whose index was `index`; its objects stay as they are."""
    _extend(index, directory, files)
    (directory / METADATA).unlink()
    write_file(directory / METADATA, encode_metadata(index))
    sync_directory(directory)


def _extend(index: Index, directory: Path, files: Sequence[WrittenFile]) -> None:
    for file in files:
        for chunk in file.chunks:
            entry = index.tensors.setdefault(chunk.key, (chunk.dtype, chunk.shape, {}))
            if entry[:2] != (chunk.dtype, chunk.shape):
                raise CheckpointError(
                    f"{directory / file.name}: {chunk.key} is {chunk.dtype} {list(chunk.shape)} here, "
                    f"{entry[0]} {list(entry[1])} in another file"
                )
            if chunk.region in entry[2]:
                raise CheckpointError(f"{directory / file.name}: {chunk.key}{chunk.region} is written twice")
            entry[2][chunk.region] = Item(file.name, chunk.offset, chunk.length)
    for key, (_, shape, chunks) in index.tensors.items():
        fault = tiling_fault(list(chunks), shape)
        if fault is not None:
            raise CheckpointError(f"{directory}: chunks of {key} of shape {list(shape)}: {fault}")


def write_index_files(directory: Path, index: Index) -> list[WrittenFile]:
    """.metadata, common.pt, metadata.json, and the empty objects of layers; fsynced."""
    empty = object_item([None])
    written = {}
    for key, entry in list(index.tensors.items()):
        if key.replace(_NORM, _ROUTER) in index.tensors and (name := other_name(key)):
            index.tensors[name] = entry
    for key, (_, shape, _) in sorted(index.tensors.items()):
        for name in _extra_states(key, shape):
            index.objects[name] = Item(OBJECTS, 0, len(empty))
    if index.objects:
        written[OBJECTS] = empty
    written[COMMON] = object_item({})  # what it holds, dist_checkpointing.load adds to every state dict
    written[BACKEND] = json.dumps(_BACKEND).encode()
    written[METADATA] = encode_metadata(index)
    for name, data in written.items():
        write_file(directory / name, data)
    sync_directory(directory)
    return [WrittenFile(name, len(data), blake3(data).hexdigest()) for name, data in written.items()]


def other_name(key: str) -> str:
    """The name that a Transformer Engine layer of megatron-core gives the norm before a mixture of experts; else "".

    Its local layer names that norm as part of a linear, as both do in dense layers. Written checkpoints have one copy
    of the bytes under both names.
    """
    inside = key.startswith(_LAYERS) and key.endswith(_NORM)
    return key.removesuffix(_NORM) + "pre_mlp_layernorm.weight" if inside else ""


def _extra_states(key: str, shape: tuple[int, ...]) -> Iterator[str]:
    """The `_extra_state` objects that megatron-core's linears ask for beside this weight: one a layer, one an expert.

    Its MambaModel, other than its GPTModel, asks for that of the output layer as well.
    """
    if key == _MAMBA_MODEL_NORM:
        yield "output_layer._extra_state/shard_0_1"
    linear = _LINEAR.fullmatch(key)
    if linear is not None:
        axes = (linear["layer"] is None and linear["mtp"] is None) + (".experts.experts." in key)
        sizes = shape[:axes] or (1,)
        of = ".".join(map(str, sizes))
        for place in product(*map(range, sizes)):
            yield f"{linear['module']}._extra_state/shard_{'.'.join(map(str, place))}_{of}"
