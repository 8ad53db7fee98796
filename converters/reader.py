"""Reads regions of Megatron tensors out of Hugging Face or torch_dist files: exactly the bytes asked for."""

from pathlib import Path
from typing import Any

from mswift.converters.io.files import PIECE_BYTES
from mswift.converters.io.strided import gather
from mswift.converters.layout import Piece, Region, flatten, restrict
from mswift.converters.plan import DTYPE_BYTES, ModelTable
from mswift.converters.sources import HEAD, HfSource, MegatronSource, open_source
from mswift.errors import CheckpointError


class WeightReader:
    """A model directory in Megatron space; one thread.

    Strict at construction: every tensor of the table, none extra, right shapes, one dtype; else CheckpointError.
    A tied model's own lm_head.weight is compared with the embedding.
    """

    def __init__(self, path: Path) -> None:
        self._source = open_source(Path(path))
        self._source.check_repeats((HEAD,))
        self.table: ModelTable = self._source.table
        self.config: dict[str, Any] = self._source.config
        self.dtype: str = self._source.dtype
        self.hf_files: Path = self._source.hf_files
        self._hf_bytes = 0
        self._tile = memoryview(bytearray(PIECE_BYTES))

    def dtype_of(self, key: str) -> str:
        """Dtype of one Megatron tensor; `dtype` but for the few that may have their own."""
        return self._source.dtype_of(self.table.pieces(key, range(1), range(1))[0].names[0])

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far."""
        return self._source.files.bytes_read if isinstance(self._source, MegatronSource) else self._hf_bytes

    def read(self, key: str, region: Region, out: memoryview) -> None:
        """Fills `out` with the C-order bytes of that region of the global tensor `key`."""
        if isinstance(self._source, MegatronSource):
            self._source.files.read(key, region, out)
        else:
            self._read_hf(self._source, key, region, out.cast("B"))

    def _read_hf(self, source: HfSource, key: str, region: Region, out: memoryview) -> None:
        tensor, item_bytes = self.table.megatron[key], DTYPE_BYTES[self.dtype_of(key)]
        if region.intersect(Region.full(tensor.shape)) != region:
            raise CheckpointError(f"{source.path}: {key} has shape {list(tensor.shape)}; {region} lies outside")
        if len(out) != region.num_elements * item_bytes:
            raise ValueError(f"{key}{region}: {len(out)} bytes given, {region.num_elements * item_bytes} needed")
        for whole in self.table.pieces_in(key, region):
            for piece in restrict(whole, region, 1):
                self._hf_bytes += self._gather(source, piece, region, item_bytes, out)

    def _gather(self, source: HfSource, piece: Piece, region: Region, item_bytes: int, out: memoryview) -> int:
        name, start = piece.names[0], piece.starts[1]
        stored = source.tensors[name]
        local = tuple(s - o for s, o in zip(start, region.offsets, strict=True))
        to_out = Piece(piece.names, (piece.starts[0], local), piece.dims).inverse()
        copy = flatten(to_out, (region.sizes, stored.shape), item_bytes)
        return gather(source.fd(stored.path), stored.path, copy.moved(1, stored.offset), out, 0, self._tile)
