"""megatron-core's `torch_dist` checkpoints as bytes: write one rank's file, index a directory."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from blake3 import blake3

from mswift.converters.io.dcp_metadata import METADATA, Index, Item, encode_metadata
from mswift.converters.io.files import PIECE_BYTES, sync_directory, write_file
from mswift.converters.io.torch_item import LARGEST_ITEM_BYTES, object_item, tensor_envelope
from mswift.converters.layout import Region, tiling_fault
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
_LAYERS = ("decoder.layers.", "mtp.layers.")
_OTHER_NAMES = {
    "mlp.linear_fc1.layer_norm_weight": ("pre_mlp_layernorm.weight", "mlp.router.weight"),
    "pre_mlp_layernorm.weight": ("mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight"),
    "self_attention.q_layernorm.weight": (
        "self_attention.linear_q_up_proj.layer_norm_weight",
        "self_attention.linear_q_up_proj.weight",
    ),
    "self_attention.kv_layernorm.weight": (
        "self_attention.linear_kv_up_proj.layer_norm_weight",
        "self_attention.linear_kv_up_proj.weight",
    ),
}
"""End of a norm's name -> its end in layers of the other kind, where there is the weight that follows."""
_MAMBA_MODEL_NORM = "decoder.final_norm.weight"


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
        name, beside = _other_name(key)
        if beside in index.tensors:
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
    """The name of a norm in layers of the other kind (local, Transformer Engine) of megatron-core; "" if it has one.

    The layers differ in which norms are parts of a linear: before a mixture of experts, before the dense layers of
    latent attention, and inside latent attention. Written checkpoints have one copy of the bytes under both names.
    """
    return _other_name(key)[0]


def _other_name(key: str) -> tuple[str, str]:
    """The other name, and the weight without which no layer uses it."""
    for end, others in _OTHER_NAMES.items():
        if key.startswith(_LAYERS) and key.endswith(end):
            name, beside = (key.removesuffix(end) + other for other in others)
            return name, beside
    return "", ""


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
