"""A source of weights: the tensors of the table of a config.json, each with a dtype, a shape and its bytes.

The bytes lie at places in files, or are made by a decoding (dequantised weights, casts that were asked for).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from mswift.converters.catalog import check_ignorable, config_path, ignored_fields, read_config
from mswift.converters.decode import DTYPE_NAMES, CodePart, DecodedBytes, Decoding, Fetch, cast
from mswift.converters.export_config import config_edits
from mswift.converters.io.descriptors import Descriptors
from mswift.converters.io.files import PIECE_BYTES
from mswift.converters.io.side_files import carried_files, edited_json
from mswift.converters.io.strided import Read, cut, gather
from mswift.converters.layout import Dim, Piece, Region, flatten, restrict
from mswift.converters.plan import DTYPE_BYTES, WEIGHT_DTYPES, ModelTable
from mswift.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class SourceOptions:
    """What the command says about a source.

    model_config: config.json, or its directory, of a checkpoint that has none. ignored: config fields that need not
    be known. dtype: that of all weights but those that may have their own (None: as stored, dequantised: BF16).
    complete: add the config fields that vLLM needs. changes: fields of config.json that have other values than there.
    """

    model_config: Path | None = None
    ignored: tuple[str, ...] = ()
    dtype: str | None = None
    complete: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Bytes of one HF tensor (side 0 of the flat map) in a file (side 1); `fd` is -1 where the file is not open."""

    path: Path
    copy: Piece
    fd: int = -1


def run_of_bytes(name: str, size: int, offset: int) -> Piece:
    """A tensor that lies in one run of a file."""
    return Piece((name, name), ((0,), (offset,)), (Dim(size, (0, 0), (1, 1)),))


def chunk_places(
    piece: Piece, hf_shape: tuple[int, ...], chunk: Region, dtype: str, data: tuple[Path, int]
) -> Iterator[Place]:
    """The bytes of a piece of an HF tensor that lie in one chunk of its Megatron tensor; data: (path, offset)."""
    path, offset = data
    for part in restrict(piece, chunk, 1):
        local = tuple(s - o for s, o in zip(part.starts[1], chunk.offsets, strict=True))
        inside = Piece(part.names, (part.starts[0], local), part.dims)
        copy = flatten(inside, (hf_shape, chunk.sizes), DTYPE_BYTES[dtype])
        yield Place(path, copy.moved(1, offset))


class Source(ABC):
    """The tensors of a model, checked against the table of its config.json.

    `dropped`: tensors that no model reads, with the reason; `repeats`: those of them whose bytes must equal, and
    come back from, another one's. `config_edits`: fields of config.json that an exported copy has otherwise
    (None: not at all).
    """

    format: str
    table: ModelTable
    dtype: str
    order: list[str]
    repeats: dict[str, str]

    def __init__(self, path: Path, hf_files: Path, options: SourceOptions) -> None:
        self.path, self.hf_files, self.options = path, hf_files, options
        self._open = Descriptors()
        self._or_file = options.model_config is not None
        self.ignored = tuple(dict.fromkeys((*ignored_fields(hf_files), *options.ignored)))
        self.config: dict[str, Any] = read_config(hf_files, self.ignored, or_file=self._or_file)
        for name in options.ignored:
            if name not in read_config(hf_files, (), or_file=self._or_file):
                raise ConfigError(f"--ignore_config_fields {name}: {config_path(hf_files)} has no such field")
        self.config |= options.changes
        check_ignorable(read_config(hf_files, (), or_file=self._or_file), options.ignored)
        self.dropped: dict[str, str] = {}
        self.repeats = {}
        self._decodings: dict[str, Decoding] = {}

    @abstractmethod
    def stored_dtype(self, name: str) -> str:
        """Dtype in the files of the stored tensor of that name."""

    @abstractmethod
    def places(self, name: str) -> list[Place]:
        """Where the bytes of a tensor lie: of an HF tensor without decoding, or of a decoding's input."""

    @abstractmethod
    def extents(self) -> dict[str, list[tuple[int, int]]]:
        """File name -> (offset, size) of every tensor in it."""

    def check_repeats(self, names: Collection[str] | None = None) -> None:
        """CheckpointError unless the repeats (some of them, or all) have the bytes of their originals."""
        assert not self.repeats, names

    def dtype_of(self, name: str) -> str:
        """Dtype of one HF tensor; `dtype` but for the few that may have their own."""
        decoding = self._decodings.get(name)
        return self.stored_dtype(name) if decoding is None else decoding.dtype

    def decoding(self, name: str) -> Decoding | None:
        """How the bytes of an HF tensor are made; None if they are those at its places."""
        return self._decodings.get(name)

    @property
    def decoded(self) -> dict[str, str]:
        """HF name -> rule, of all tensors of the model that are made while reading."""
        return {name: decoding.rule for name, decoding in self._decodings.items() if name in self.table.hf}

    def num_bytes(self, name: str) -> int:
        """Size of one HF tensor."""
        return prod(self.table.hf[name]) * DTYPE_BYTES[self.dtype_of(name)]

    def stream(self, name: str, tile: memoryview, part: CodePart | None = None) -> Read:
        """The bytes of an HF tensor, or of a part of its codes; one thread."""
        decoding = self.decoding(name)
        if decoding is not None:
            decoding = decoding if part is None else decoding.of(part)
            inputs = [(each, self.places(each)) for each in decoding.inputs]
            return DecodedBytes(decoding, fetch_from(inputs, self._open)).read
        places = self.places(name)

        def read(low: int, high: int, block: memoryview) -> memoryview:
            view = block[: high - low]
            read_places(name, places, low, high, view, tile, self._open)
            return view

        return read

    def read_run(self, run: Place, copy: Piece, out: memoryview, tile: memoryview) -> int:
        """Fills `out` by a map into the one run of bytes of an HF tensor; returns bytes read."""
        with self._open.held([run.path]) as fds:
            return gather(fds[run.path], run.path, copy.moved(1, run.copy.starts[1][0]), out, 0, tile)

    @property
    def config_edits(self) -> dict[str, Any]:
        """Fields of config.json that an exported copy has otherwise: name -> value, None for a field left out."""
        wanted = self.dtype if self._decodings else None
        stored = read_config(self.hf_files, (), or_file=self._or_file)
        return {**self.options.changes, **config_edits(stored, wanted, complete=self.options.complete)}

    def side_files(self) -> dict[str, Path | bytes]:
        """Name -> the file or its bytes: config.json, tokenizer and the like."""
        files: dict[str, Path | bytes] = {}
        if self.hf_files.is_file():
            files["config.json"] = self.hf_files
        else:
            files |= {path.name: path for path in carried_files(self.hf_files)}
        edits = self.config_edits
        if edits:
            files["config.json"] = edited_json(config_path(self.hf_files), edits)
        return files

    def close(self) -> None:
        """Closes the files."""
        self._open.close()

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def _cast_all(self, has_own: Callable[[str], bool]) -> None:
        """The dtype that was asked for: decodings of all weights that have another one."""
        wanted = self.options.dtype
        for name, shape in self.table.hf.items() if wanted else ():
            dtype = self.dtype_of(name)
            if name not in self._decodings and dtype != wanted and not has_own(name):
                assert wanted is not None
                self._decodings[name] = cast(name, _Shaped(dtype, shape), wanted)

    def _one_dtype(self, has_own: Callable[[str], bool]) -> str:
        """The dtype of the weights; CheckpointError where HF tensors of one Megatron tensor differ."""
        dtype = one_dtype(str(self.path), {name: self.dtype_of(name) for name in self.table.hf}, has_own)
        first: dict[str, str] = {}
        for name in self.table.hf:
            other = first.setdefault(self.table.hf_pieces[name][0].names[1], name)
            if self.dtype_of(name) != self.dtype_of(other):
                raise CheckpointError(
                    f"{self.path}: {name} is {self.dtype_of(name)}, but {other} is {self.dtype_of(other)}; one "
                    "dtype is expected (mswift convert --dtype makes it one)"
                )
        return dtype


def fetch_from(inputs: Sequence[tuple[str, Sequence[Place]]], files: Descriptors) -> Fetch:
    """Reads bytes of stored tensors, given by name and places, whose files are opened in `files`."""
    tile = memoryview(bytearray(PIECE_BYTES))

    def fetch(number: int, low: int, high: int) -> memoryview:
        view = memoryview(bytearray(high - low))
        read_places(*inputs[number], low, high, view, tile, files)
        return view

    return fetch


@dataclass(frozen=True)
class _Shaped:
    dtype: str
    shape: tuple[int, ...]


def read_places(
    name: str,
    places: Sequence[Place],
    low: int,
    high: int,
    view: memoryview,
    tile: memoryview,
    files: Descriptors,
) -> None:
    """Bytes [low, high) of the tensor with these places into `view`; CheckpointError if some are nowhere."""
    count = 0
    for place in places:
        parts = cut(place.copy, low, high)
        if parts:
            with files.held([place.path]) as fds:
                count += sum(gather(fds[place.path], place.path, part, view, low, tile) for part in parts)
    if count != high - low:
        raise CheckpointError(f"{name}: the source has {count} of the bytes {low}:{high}")


def dtype_option(text: str | None) -> str | None:
    """safetensors' name of a --dtype."""
    if text is None:
        return None
    if text not in DTYPE_NAMES:
        raise ConfigError(f"--dtype {text!r}: one of {', '.join(DTYPE_NAMES)} is needed")
    return DTYPE_NAMES[text]


def check_shapes(where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """CheckpointError unless the names are the same and every shape is."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("not in the model", extra))
            if names
        ]
        raise CheckpointError(
            f"{where}: has {len(found)} tensors, its config.json describes {len(expected)}: {'; '.join(parts)}"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(f"{where}: {name} has shape {list(found[name])}; config.json says {list(shape)}")


def one_dtype(where: str, dtypes: Mapping[str, str], has_own: Callable[[str], bool]) -> str:
    """The one floating dtype of all tensors but those that may have their own; CheckpointError naming the first
    that differs.
    """
    first_name, first = next(((n, d) for n, d in dtypes.items() if not has_own(n)), ("", ""))
    for name, dtype in dtypes.items():
        if dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{where}: {name} is {dtype}; weights must be one of {', '.join(WEIGHT_DTYPES)}")
        if dtype != first and not has_own(name):
            raise CheckpointError(
                f"{where}: {name} is {dtype}, but {first_name} is {first}; one dtype is expected (mswift convert "
                "--dtype makes it one)"
            )
    return first
