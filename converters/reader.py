"""Reads regions of Megatron tensors out of Hugging Face or torch_dist files: exactly the bytes asked for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mswift.converters.catalog import IGNORED_FIELDS
from mswift.converters.decode import CodePart
from mswift.converters.io.files import PIECE_BYTES
from mswift.converters.io.strided import Read, gather_from
from mswift.converters.layout import Piece, Region, flatten, restrict
from mswift.converters.plan import DTYPE_BYTES, ModelTable
from mswift.converters.sources import HEAD, MegatronSource, Place, SourceOptions, open_source
from mswift.errors import CheckpointError


class WeightReader:
    """A model directory in Megatron space; one thread.

    Strict at construction: every tensor of the table, none extra, right shapes, one dtype; else CheckpointError.
    A tied model's own lm_head.weight is compared with the embedding. changes: fields of config.json that are to have
    other values than there (`mswift.converters.longer`).
    """

    def __init__(self, path: Path, changes: Mapping[str, Any] | None = None) -> None:
        self._source = open_source(Path(path), SourceOptions(changes=changes or {}))
        self._source.check_repeats((HEAD,))
        self.table: ModelTable = self._source.table
        self.config: dict[str, Any] = self._source.config
        self.dtype: str = self._source.dtype
        self.hf_files: Path = self._source.hf_files
        self.num_left_out = 0
        self._hf_bytes = 0
        self._tile, self._block = (memoryview(bytearray(PIECE_BYTES)) for _ in range(2))
        self._last: tuple[tuple[str, CodePart | None], Read] | None = None

    def leave_out_mtp(self) -> None:
        """Be the model without its multi-token-prediction layers; `num_left_out` says how many these are."""
        self.num_left_out += len(self.table.spec.mtp_layers)
        self.table = self.table.without_mtp()

    def dtype_of(self, key: str) -> str:
        """Dtype of one Megatron tensor; `dtype` but for the few that may have their own."""
        return self._source.dtype_of(self.table.pieces(key, range(1), range(1))[0].names[0])

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far (of decoded ones: bytes made)."""
        return self._source.files.bytes_read if isinstance(self._source, MegatronSource) else self._hf_bytes

    def side_files(self) -> dict[str, bytes]:
        """config.json (as it must be beside the weights as they are read here), tokenizer and the like."""
        files = self._source.side_files()
        if self._source.ignored:
            files[IGNORED_FIELDS] = json.dumps({"ignored_config_fields": self._source.ignored}).encode()
        return {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in files.items()}

    @property
    def coded(self) -> dict[str, str]:
        """HF name -> dtype of its scales, of the weights that are made of integer codes."""
        found = ((name, self._source.decoding(name)) for name in self.table.hf)
        return {name: decoding.scale_dtype for name, decoding in found if decoding and decoding.scale_dtype}

    def read(self, key: str, region: Region, out: memoryview, part: CodePart | None = None) -> None:
        """Fills `out` with the C-order bytes of that region of the global tensor `key`.

        part: of weights in `coded`, in place of their values (F32).
        """
        if isinstance(self._source, MegatronSource):
            assert part is None, key
            self._source.read(key, region, out)
        else:
            self._read_hf(key, region, out.cast("B"), part)

    def _read_hf(self, key: str, region: Region, out: memoryview, part: CodePart | None) -> None:
        tensor, item_bytes = self.table.megatron[key], DTYPE_BYTES["F32" if part else self.dtype_of(key)]
        if region.intersect(Region.full(tensor.shape)) != region:
            raise CheckpointError(f"{self._source.path}: {key} has shape {list(tensor.shape)}; {region} lies outside")
        if len(out) != region.num_elements * item_bytes:
            raise ValueError(f"{key}{region}: {len(out)} bytes given, {region.num_elements * item_bytes} needed")
        for whole in self.table.pieces_in(key, region):
            for piece in restrict(whole, region, 1):
                self._hf_bytes += self._gather(piece, region, item_bytes, out, part)

    def _gather(self, piece: Piece, region: Region, item_bytes: int, out: memoryview, part: CodePart | None) -> int:
        name, start = piece.names[0], piece.starts[1]
        local = tuple(s - o for s, o in zip(start, region.offsets, strict=True))
        to_out = Piece(piece.names, (piece.starts[0], local), piece.dims).inverse()
        copy = flatten(to_out, (region.sizes, self.table.hf[name]), item_bytes)
        run = self._one_run(name)
        if run is not None:
            return self._source.read_run(run, copy, out, self._tile)
        return gather_from(self._stream(name, part), copy, out, self._block)

    def _one_run(self, name: str) -> Place | None:
        """The place of an HF tensor that lies in one run of a file."""
        if self._source.decoding(name) is not None:
            return None
        places = self._source.places(name)
        dims = places[0].copy.dims
        return places[0] if len(places) == 1 and len(dims) <= 1 else None

    def _stream(self, name: str, part: CodePart | None) -> Read:
        """The bytes of an HF tensor; the last stream is kept, as it may hold what it decoded."""
        if self._last is None or self._last[0] != (name, part):
            self._last = ((name, part), self._source.stream(name, self._tile, part))
        return self._last[1]
