"""The files of a destination before they are written: sizes, what lies around the tensors, where each tensor goes."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from pathlib import Path
from types import MappingProxyType

from mswift.converters.io.dcp_metadata import Index, Item
from mswift.converters.io.files import write_file
from mswift.converters.io.safetensors import INDEX, SINGLE, encode_header
from mswift.converters.io.torch_dist import PAGE_BYTES, split_region, write_index_files
from mswift.converters.io.torch_item import tensor_envelope
from mswift.converters.layout import Chunks, Piece, Region, tiling_fault
from mswift.converters.plan import DTYPE_BYTES, ModelTable
from mswift.converters.sources import HF_FOLDER, Place, chunk_places, run_of_bytes
from mswift.errors import CheckpointError

FILE_BYTES = 4 << 30
"""Largest torch_dist file, about."""

FEWEST_FILES = 8
"""torch_dist files of a model of at least 8 x 64 MiB: writers of one file wait for each other."""

_SMALL_FILE_BYTES = 64 << 20

_NAMES = ("", "")
_NO_PATH = Path()


class HfDestination:
    """safetensors shards of at most `max_shard_bytes`, with an index if there is more than one.

    `dtypes`: of each HF tensor. `copies`: HF name -> name of the tensor whose bytes it repeats (a tied model's own
    lm_head.weight); a copy has its own home and places.
    """

    format = "safetensors"
    side_folder = "."

    def __init__(
        self,
        directory: Path,
        table: ModelTable,
        dtypes: Mapping[str, str],
        copies: Mapping[str, str],
        max_shard_bytes: int,
    ) -> None:
        self.directory = directory
        self.copies = copies
        origin = {name: name for name in table.hf_order} | dict(copies)
        self._bytes = {name: prod(table.hf[of]) * DTYPE_BYTES[dtypes[of]] for name, of in origin.items()}
        self._num_elements = sum(prod(table.hf[of]) for of in origin.values())
        self.sizes: dict[str, int] = {}
        self.extents: dict[str, list[tuple[int, int]]] = {}
        self._headers: dict[str, bytes] = {}
        self._places: dict[str, tuple[str, int]] = {}
        shards = self._shards(max_shard_bytes)
        for number, names in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            header, offsets = encode_header({n: (dtypes[origin[n]], table.hf[origin[n]]) for n in names})
            self._headers[file] = header
            self.sizes[file] = len(header) + sum(self._bytes[name] for name in names)
            self.extents[file] = [(offsets[name], self._bytes[name]) for name in names]
            self._places |= {name: (file, offset) for name, offset in offsets.items()}

    def _shards(self, max_shard_bytes: int) -> list[list[str]]:
        shards: list[list[str]] = [[]]
        used = 0
        for name, size in self._bytes.items():
            if shards[-1] and used + size > max_shard_bytes:
                shards.append([])
                used = 0
            shards[-1].append(name)
            used += size
        return shards

    def home(self, name: str) -> str:
        """The file that holds most of an HF tensor."""
        return self._places[name][0]

    def places(self, name: str) -> list[Place]:
        """Where the bytes of an HF tensor go."""
        file, offset = self._places[name]
        return [Place(self.directory / file, run_of_bytes(name, self._bytes[name], offset))]

    def frame(self, file: str) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of what a file holds besides tensors."""
        yield 0, self._headers[file]

    def finish(self) -> None:
        """Writes the index of several shards."""
        if len(self.sizes) > 1:
            weight_map = {name: self._places[name][0] for name in sorted(self._places)}
            metadata = {"total_size": sum(self._bytes.values()), "total_parameters": self._num_elements}
            text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"
            write_file(self.directory / INDEX, text.encode())


class MegatronDestination:
    """torch_dist files whose chunks are fine enough for the largest tensor-parallel size up to 8.

    Chunks follow each other in the order of the HF tensors that fill them, so that a file is about a range of layers.
    """

    format = "torch_dist"
    side_folder = HF_FOLDER
    copies: Mapping[str, str] = MappingProxyType({})

    def __init__(self, directory: Path, table: ModelTable, dtypes: Mapping[str, str]) -> None:
        self.directory = directory
        self._table, self._dtypes = table, dtypes
        self._index = Index()
        self._chunks: dict[str, Chunks] = {}
        self._data: dict[tuple[str, Region], tuple[str, int]] = {}
        self._homes: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.extents: dict[str, list[tuple[int, int]]] = {}
        self._framed: dict[str, list[tuple[int, str, tuple[int, ...]]]] = {}
        self._plan_chunks()
        self._lay_out()

    def _plan_chunks(self) -> None:
        dtype_of = {
            piece.names[1]: self._dtypes[name] for name in self._table.hf for piece in self._table.hf_pieces[name]
        }
        for key, tensor in self._table.megatron.items():
            item_bytes = DTYPE_BYTES[dtype_of[key]]
            regions = [part for r in self._table.storage_regions(key) for part in split_region(r, item_bytes)]
            fault = tiling_fault(regions, tensor.shape)
            if fault is not None:
                raise CheckpointError(f"chunks of {key} of shape {list(tensor.shape)}: {fault}")
            self._chunks[key] = Chunks(regions)
            self._index.tensors[key] = (dtype_of[key], tensor.shape, {})

    def _lay_out(self) -> None:
        """Gives every chunk its file and offset; a file is full when its share of the bytes is reached."""
        total = sum(prod(shape) * DTYPE_BYTES[dtype] for dtype, shape, _ in self._index.tensors.values())
        num_files = max(1, min(FEWEST_FILES, total // _SMALL_FILE_BYTES), -(-total // FILE_BYTES))
        done = number = position = 0
        for name in self._table.hf_order:
            held: Counter[str] = Counter()
            if number + 1 < num_files and done >= total * (number + 1) // num_files:
                number, position = number + 1, 0
            file = f"__{number}_0.distcp"
            for piece in self._table.hf_pieces[name]:
                key = piece.names[1]
                for chunk, common in self._chunks[key].overlapping(piece.hull(1)):
                    if (key, chunk) not in self._data:
                        position = self._add(key, chunk, file, position)
                        done += self.extents[file][-1][1]
                    held[self._data[key, chunk][0]] += common.num_elements
            self._homes[name] = held.most_common(1)[0][0] if held else file

    def _add(self, key: str, chunk: Region, file: str, start: int) -> int:
        """Places one chunk at the end of a file; returns the new end."""
        dtype = self._index.tensors[key][0]
        prefix, suffix = tensor_envelope(dtype, chunk.sizes)
        data_bytes = chunk.num_elements * DTYPE_BYTES[dtype]
        if data_bytes >= 1 << 20:
            start += -(start + len(prefix)) % PAGE_BYTES
        data = start + len(prefix)
        end = self.sizes[file] = data + data_bytes + len(suffix)
        self._framed.setdefault(file, []).append((start, dtype, chunk.sizes))
        self._data[key, chunk] = (file, data)
        self.extents.setdefault(file, []).append((data, data_bytes))
        self._index.tensors[key][2][chunk] = Item(file, start, end - start)
        return end

    def home(self, name: str) -> str:
        """The file that holds most of an HF tensor."""
        return self._homes[name]

    def places(self, name: str) -> list[Place]:
        """Where the bytes of an HF tensor go."""
        result: list[Place] = []
        for piece in self._table.hf_pieces[name]:
            key = piece.names[1]
            for chunk, _ in self._chunks[key].overlapping(piece.hull(1)):
                file, offset = self._data[key, chunk]
                shift = tuple(s - o for s, o in zip(piece.starts[1], chunk.offsets, strict=True))
                moved = Piece(_NAMES, (piece.starts[0], shift), piece.dims)
                path = self.directory / file
                for copy in _inside(moved, self._table.hf[name], chunk.sizes, self._dtypes[name]):
                    result.append(Place(path, copy.moved(1, offset)))
        return result

    def frame(self, file: str) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of what a file holds besides tensors."""
        before, ending = 0, b""  # the end of one item and the beginning of the next are one write
        for start, dtype, sizes in self._framed[file]:
            prefix, suffix = tensor_envelope(dtype, sizes)
            if before + len(ending) == start:
                yield before, ending + prefix
            else:
                yield before, ending
                yield start, prefix
            before, ending = start + len(prefix) + prod(sizes) * DTYPE_BYTES[dtype], suffix
        yield before, ending

    def finish(self) -> None:
        """Writes .metadata, common.pt, metadata.json and the empty objects that megatron-core asks for."""
        write_index_files(self.directory, self._index)


@lru_cache(1024)
def _inside(piece: Piece, hf_shape: tuple[int, ...], sizes: tuple[int, ...], dtype: str) -> tuple[Piece, ...]:
    """The bytes of a piece inside a chunk, which begins at 0: the same for all layers and experts."""
    places = chunk_places(piece, hf_shape, Region.full(sizes), dtype, (_NO_PATH, 0))
    return tuple(place.copy for place in places)


Destination = HfDestination | MegatronDestination
