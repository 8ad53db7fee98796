"""`.metadata` of torch.distributed.checkpoint: the tensors, their chunks, and which bytes of which file hold each."""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from mswift.converters.io.pickle_writer import TORCH_DTYPES, PickleWriter
from mswift.converters.io.safe_pickle import MOST_AXES, Record, brief, collector_paused, load_pickle
from mswift.converters.io.side_files import check_link
from mswift.converters.layout import Region
from mswift.errors import CheckpointError

METADATA = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True)
class Item:
    """Bytes [offset, offset + length) of a file of the directory."""

    file: str
    offset: int
    length: int


@dataclass
class Index:
    """tensors: name -> (dtype, shape, {chunk region: item}); objects: name -> item."""

    tensors: dict[str, tuple[str, tuple[int, ...], dict[Region, Item]]] = field(default_factory=dict)
    objects: dict[str, Item] = field(default_factory=dict)

    def files(self) -> set[str]:
        """Names of all files that hold items."""
        chunks = (item for _, _, items in self.tensors.values() for item in items.values())
        return {item.file for item in (*chunks, *self.objects.values())}


def read_metadata(directory: Path) -> Index:
    """Parses `.metadata` with an allow-list; CheckpointError if it is missing, malicious or contradictory, or if it
    or a file that it names is a link that leads out of the directory.
    """
    path = directory / METADATA
    check_link(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{directory}: has no readable {METADATA} ({error.strerror}); "
            "it is not a torch_dist checkpoint, or it is incomplete"
        ) from None
    try:
        with collector_paused():
            index = _index(load_pickle(data))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is not the metadata of a checkpoint ({type(error).__name__}: {error})"
        ) from None
    for file in index.files():
        check_link(directory / file)
    return index


def _index(metadata: Record) -> Index:
    index = Index()
    items: dict[tuple[str, tuple[int, ...] | None], Item] = {}
    for key, info in metadata.field("storage_data").items():
        state = key.state
        offset = state.get("offset")
        items[_text(state["fqn"]), None if offset is None else _ints(offset)] = _item(info)
    for name, entry in metadata.field("state_dict_metadata").items():
        if type(entry).__name__ == "BytesStorageMetadata":
            index.objects[_text(name)] = items[name, None]
            continue
        shape, dtype = _ints(entry.field("size")), _text(entry.field("properties").state[0])
        if dtype not in TORCH_DTYPES:
            raise ValueError(f"tensor {name} has dtype {brief(dtype)}")
        chunks: dict[Region, Item] = {}
        for chunk in entry.field("chunks"):
            region = Region(_ints(chunk.field("offsets")), _ints(chunk.field("sizes")))
            if len(region.offsets) != len(shape) or len(region.sizes) != len(shape):
                raise ValueError(f"tensor {name} of shape {list(shape)} has a chunk {region}")
            if region in chunks:
                raise ValueError(f"tensor {name} has the chunk {region} twice")
            chunks[region] = items[name, region.offsets]
        index.tensors[_text(name)] = (dtype, shape, chunks)
    return index


@lru_cache(maxsize=1 << 12)
def _check_plain(file: str) -> None:
    if PurePosixPath(file).name != file or file in ("", ".", ".."):
        raise ValueError(f"{file!r} is not a plain file name")


def _item(info: Record) -> Item:
    file = _text(info.field("relative_path"))
    _check_plain(file)
    if info.state.get("transform_descriptors"):
        raise ValueError(f"{file!r} is compressed or encrypted")
    return Item(file, *_ints((info.field("offset"), info.field("length"))))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{brief(value)} is not a name")
    return value


def _ints(values: Any) -> tuple[int, ...]:
    result = tuple(values) if len(values) <= MOST_AXES else ()
    if len(result) != len(values) or not all(type(n) is int and 0 <= n < 1 << 62 for n in result):
        raise TypeError(f"{brief(values)} are not sizes")
    return result


def encode_metadata(index: Index) -> bytes:
    """The pickle that torch reads as Metadata; equal to what torch would write, object by object."""
    out = PickleWriter()

    def size(values: Sequence[int]) -> Any:
        return partial(out.size, tuple(values))

    def new(name: str, state: Any, module: str = _METADATA) -> Any:
        return partial(out.instance, module, name, state)

    def properties(dtype: str) -> Any:
        torch_dtype = partial(out.global_, "torch", TORCH_DTYPES[dtype])
        layout = partial(out.call, "torch.serialization", "_get_layout", ("torch.strided",))
        memory_format = partial(out.call, _METADATA, "_MEM_FORMAT_ENCODING", (0,))
        return new("TensorProperties", (torch_dtype, layout, False, memory_format, False))

    def key(name: str, offsets: tuple[int, ...] | None) -> Any:
        offset = None if offsets is None else size(offsets)
        return new("MetadataIndex", {"fqn": name, "offset": offset, "index": None})

    def info(item: Item) -> Any:
        state = {"relative_path": item.file, "offset": item.offset, "length": item.length}
        return new("_StorageInfo", state, "torch.distributed.checkpoint.filesystem")

    def entries() -> Iterator[tuple[Any, Any]]:
        for name in index.objects:
            yield partial(out.plain, name), new("BytesStorageMetadata", None)
        for name, (dtype, shape, chunks) in index.tensors.items():
            boxes = ({"offsets": size(r.offsets), "sizes": size(r.sizes)} for r in chunks)
            described = partial(out.items, (new("ChunkStorageMetadata", box) for box in boxes))
            state = {"properties": properties(dtype), "size": size(shape), "chunks": described}
            yield partial(out.plain, name), new("TensorStorageMetadata", state)

    def storage() -> Iterator[tuple[Any, Any]]:
        for name, item in index.objects.items():
            yield key(name, None), info(item)
        for name, (_, _, chunks) in index.tensors.items():
            for region, item in chunks.items():
                yield key(name, region.offsets), info(item)

    meta: dict[str, Any] = {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}
    out.instance(
        _METADATA,
        "Metadata",
        {
            "state_dict_metadata": partial(out.pairs, entries()),
            "planner_data": None,
            "storage_data": partial(out.pairs, storage()),
            "storage_meta": new("StorageMeta", meta),
            "version": "1.0.0",
        },
    )
    return out.close()
