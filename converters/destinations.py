"""Pre-sized destination files, and where in them the bytes of each HF tensor go."""

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

from mswift.converters.io.dcp_metadata import Index, Item
from mswift.converters.io.files import write_exactly, write_file
from mswift.converters.io.safetensors import INDEX, SINGLE, encode_header
from mswift.converters.io.torch_dist import PAGE_BYTES, split_region, write_index_files
from mswift.converters.io.torch_item import tensor_envelope
from mswift.converters.layout import Chunks, Region, tiling_fault
from mswift.converters.plan import DTYPE_BYTES, MegatronTensor, ModelTable
from mswift.converters.sources import HF_FOLDER, Place, chunk_places, run_of_bytes
from mswift.errors import CheckpointError

FILE_BYTES = 4 << 30
"""Largest torch_dist file, about."""


class _Files:
    """Files of known size that are written in any order."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fds: dict[str, int] = {}

    def create(self, name: str, size: int) -> int:
        fd = self.fds[name] = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        os.ftruncate(fd, size)
        return fd

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.popitem()[1])


class HfDestination(_Files):
    """safetensors shards of at most `max_shard_bytes`, with an index if there is more than one.

    `copies`: HF name -> name of the tensor whose bytes it repeats (a tied model's own lm_head.weight).
    """

    format = "safetensors"
    side_folder = "."

    def __init__(
        self, directory: Path, table: ModelTable, dtype: str, copies: Mapping[str, str], max_shard_bytes: int
    ) -> None:
        super().__init__(directory)
        self._copies: dict[str, list[str]] = {}
        for name, original in copies.items():
            self._copies.setdefault(original, []).append(name)
        shapes = {name: table.hf[name] for name in table.hf_order}
        shapes |= {name: table.hf[original] for name, original in copies.items()}
        self._item_bytes = DTYPE_BYTES[dtype]
        self._bytes = {name: prod(shape) * self._item_bytes for name, shape in shapes.items()}
        self.extents: dict[str, list[tuple[int, int]]] = {}
        self._places: dict[str, tuple[str, int]] = {}
        shards = self._shards(max_shard_bytes)
        for number, names in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            header, offsets = encode_header({name: (dtype, shapes[name]) for name in names})
            size = len(header) + sum(self._bytes[name] for name in names)
            write_exactly(self.create(file, size), memoryview(header), 0)
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

    def places(self, name: str) -> list[Place]:
        """Where the bytes of an HF tensor go; more than one place if the destination repeats it."""
        result = []
        for each in (name, *self._copies.get(name, ())):
            file, offset = self._places[each]
            copy = run_of_bytes(each, self._bytes[each], offset)
            result.append(Place(self.fds[file], self.directory / file, copy))
        return result

    def finish(self) -> None:
        """Writes the index of several shards."""
        if len(self.extents) > 1:
            total = sum(self._bytes.values())
            weight_map = {name: self._places[name][0] for name in sorted(self._places)}
            metadata = {"total_size": total, "total_parameters": total // self._item_bytes}
            text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"
            write_file(self.directory / INDEX, text.encode())


class MegatronDestination(_Files):
    """torch_dist files whose chunks are fine enough for the largest tensor-parallel size up to 8."""

    format = "torch_dist"
    side_folder = HF_FOLDER

    def __init__(self, directory: Path, table: ModelTable, dtype: str, num_files: int) -> None:
        super().__init__(directory)
        self._table, self._dtype = table, dtype
        self._index = Index()
        self._data: dict[tuple[str, Region], tuple[str, int]] = {}
        self._chunks: dict[str, Chunks] = {}
        self.extents: dict[str, list[tuple[int, int]]] = {}
        chunks = self._plan_chunks()
        total = sum(r.num_elements for _, r in chunks) * DTYPE_BYTES[dtype]
        self._num_files = max(num_files, -(-total // FILE_BYTES))
        frames = self._lay_out(chunks)
        for file, (size, pieces) in frames.items():
            fd = self.create(file, size)
            for offset, data in pieces:
                write_exactly(fd, memoryview(data), offset)

    def _plan_chunks(self) -> list[tuple[str, Region]]:
        """Layer after layer, so that source and destination are walked in about the same order."""
        result = []
        for key, tensor in self._table.megatron.items():
            regions = [
                part
                for region in self._table.storage_regions(key)
                for part in split_region(region, DTYPE_BYTES[self._dtype])
            ]
            fault = tiling_fault(regions, tensor.shape)
            if fault is not None:
                raise CheckpointError(f"chunks of {key} of shape {list(tensor.shape)}: {fault}")
            self._chunks[key] = Chunks(regions)
            self._index.tensors[key] = (self._dtype, tensor.shape, {})
            result += [(self._layer(tensor, r), key, r) for r in regions]
        return [(key, region) for _, key, region in sorted(result, key=lambda c: c[0])]

    @staticmethod
    def _layer(tensor: MegatronTensor, region: Region) -> int:
        if tensor.stacked:
            return region.offsets[0]
        return -1 if tensor.layer is None else tensor.layer

    def _lay_out(self, chunks: list[tuple[str, Region]]) -> dict[str, tuple[int, list[tuple[int, bytes]]]]:
        """Deals chunks to files; returns file -> (size, [(offset, bytes around the tensors)])."""
        names = [f"__{n}_0.distcp" for n in range(self._num_files)]
        sizes = dict.fromkeys(names, 0)
        frames: dict[str, list[tuple[int, bytes]]] = {name: [] for name in names}
        for key, region in chunks:
            file = min(names, key=sizes.__getitem__)
            prefix, suffix = tensor_envelope(self._dtype, region.sizes)
            data_bytes = region.num_elements * DTYPE_BYTES[self._dtype]
            start = sizes[file]
            if data_bytes >= 1 << 20:
                start += -(start + len(prefix)) % PAGE_BYTES
            data = start + len(prefix)
            end = data + data_bytes + len(suffix)
            frames[file] += [(start, prefix), (data + data_bytes, suffix)]
            sizes[file] = end
            self._data[key, region] = (file, data)
            self.extents.setdefault(file, []).append((data, data_bytes))
            self._index.tensors[key][2][region] = Item(file, start, end - start)
        return {name: (sizes[name], frames[name]) for name in names if sizes[name]}

    def places(self, name: str) -> list[Place]:
        """Where the bytes of an HF tensor go."""
        result: list[Place] = []
        for piece in self._table.hf_pieces[name]:
            key = piece.names[1]
            for chunk, _ in self._chunks[key].overlapping(piece.hull(1)):
                file, offset = self._data[key, chunk]
                data = (self.fds[file], self.directory / file, offset)
                result += chunk_places(piece, self._table.hf[name], chunk, self._dtype, data)
        return result

    def finish(self) -> None:
        """Writes .metadata, common.pt, metadata.json and the empty objects that megatron-core asks for."""
        write_index_files(self.directory, self._index)


Destination = HfDestination | MegatronDestination
