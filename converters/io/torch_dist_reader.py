"""megatron-core's `torch_dist` checkpoints as bytes: read any region of a tensor, whatever its chunks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import local

from mswift.converters.io.dcp_metadata import METADATA, Item, read_metadata
from mswift.converters.io.descriptors import Descriptors
from mswift.converters.io.files import PIECE_BYTES
from mswift.converters.io.strided import gather
from mswift.converters.io.torch_dist import BACKEND, other_name
from mswift.converters.io.torch_item import locate_data
from mswift.converters.layout import Chunks, Region, flatten, identity, tiling_fault
from mswift.converters.plan import DTYPE_BYTES
from mswift.errors import CheckpointError


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
            both = {key, name} <= self._index.tensors.keys()
            if both and self._index.tensors.pop(name) != self._index.tensors[key]:
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
