"""Where a model's weights come from: a Hugging Face directory, or a torch_dist one (converted, or a checkpoint)."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mswift.converters.catalog import read_config
from mswift.converters.io.dcp_metadata import METADATA
from mswift.converters.io.files import open_read, read_exactly
from mswift.converters.io.safetensors import StoredTensor, read_directory
from mswift.converters.io.torch_dist import TorchDistSource
from mswift.converters.layout import Dim, Piece, Region, flatten, restrict
from mswift.converters.manifest import read_manifest
from mswift.converters.plan import DTYPE_BYTES, WEIGHT_DTYPES, ModelTable, table_for
from mswift.errors import CheckpointError

HF_FOLDER = "hf"
_NOT_WEIGHTS = ("optimizer.", "rng.")
_ADAPTER = "adapter."
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Place:
    """Bytes of one HF tensor (side 0 of the flat map) in a file (side 1)."""

    fd: int
    path: Path
    copy: Piece


def run_of_bytes(name: str, size: int, offset: int) -> Piece:
    """A tensor that lies in one run of a file."""
    return Piece((name, name), ((0,), (offset,)), (Dim(size, (0, 0), (1, 1)),))


def chunk_places(
    piece: Piece, hf_shape: tuple[int, ...], chunk: Region, dtype: str, data: tuple[int, Path, int]
) -> Iterator[Place]:
    """The bytes of a piece of an HF tensor that lie in one chunk of its Megatron tensor; data: (fd, path, offset)."""
    fd, path, offset = data
    for part in restrict(piece, chunk, 1):
        local = tuple(s - o for s, o in zip(part.starts[1], chunk.offsets, strict=True))
        inside = Piece(part.names, (part.starts[0], local), part.dims)
        copy = flatten(inside, (hf_shape, chunk.sizes), DTYPE_BYTES[dtype])
        yield Place(fd, path, copy.moved(1, offset))


class HfSource:
    """The tensors of a Hugging Face directory, checked against the table of its config.json.

    `dropped`: tensors that no model reads, with the reason; `repeats`: those among them whose bytes must equal
    another tensor's (a tied checkpoint's own `lm_head.weight`), which `check_repeats` reads and compares.
    """

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = self.hf_files = path
        self.config = read_config(path)
        stored = read_directory(path)
        self.table: ModelTable = table_for(self.config, stored)
        self.fds: dict[Path, int] = {}
        self.all_tensors: Mapping[str, StoredTensor] = stored
        drops = {name: self.table.dropped[name] for name in stored if name in self.table.dropped}
        self.dropped = {name: drop.reason for name, drop in drops.items()}
        self.repeats = {name: drop.same_as for name, drop in drops.items() if drop.same_as}
        self.tensors = {name: tensor for name, tensor in stored.items() if name not in self.dropped}
        check_shapes(str(path), {n: t.shape for n, t in self.tensors.items()}, self.table.hf)
        self.dtype = one_dtype(str(path), {n: t.dtype for n, t in self.tensors.items()}, self.table.has_own_dtype)
        self.order = sorted(self.tensors, key=lambda n: (self.tensors[n].path, self.tensors[n].offset))

    def dtype_of(self, name: str) -> str:
        """Dtype of one HF tensor; `dtype` but for the few that may have their own."""
        return self.tensors[name].dtype

    def places(self, name: str) -> list[Place]:
        """Where the bytes of an HF tensor lie."""
        tensor = self.tensors[name]
        return [Place(self.fd(tensor.path), tensor.path, run_of_bytes(name, tensor.nbytes, tensor.offset))]

    def extents(self) -> dict[str, list[tuple[int, int]]]:
        """File name -> (offset, size) of every tensor in it."""
        result: dict[str, list[tuple[int, int]]] = {}
        for tensor in self.all_tensors.values():
            result.setdefault(tensor.path.name, []).append((tensor.offset, tensor.nbytes))
        return result

    def fd(self, path: Path) -> int:
        """An open descriptor of one of the weight files."""
        fd = self.fds.get(path)
        if fd is None:
            fd = open_read(path)
            if self.fds.setdefault(path, fd) != fd:  # another thread was faster
                os.close(fd)
        return self.fds[path]

    def close(self) -> None:
        """Closes the files."""
        while self.fds:
            os.close(self.fds.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "fds"):
            self.close()

    def check_repeats(self, names: Collection[str] | None = None) -> None:
        """CheckpointError unless the repeats (some of them, or all) have the bytes of their originals."""
        for name, original in self.repeats.items():
            if original in self.all_tensors and (names is None or name in names):
                self._check_repeat(original, name, self.dropped[name])

    def _check_repeat(self, original: str, name: str, reason: str) -> None:
        first, second = self.all_tensors[original], self.all_tensors[name]
        where = f"{second.path}: {name} ({reason})"
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            raise CheckpointError(
                f"{where} is {second.dtype} {list(second.shape)}, but {original} is {first.dtype} {list(first.shape)}"
            )
        a, b = (memoryview(bytearray(1 << 20)) for _ in range(2))
        for start in range(0, second.nbytes, 1 << 20):
            size = min(1 << 20, second.nbytes - start)
            for tensor, buffer in ((first, a), (second, b)):
                read_exactly(self.fd(tensor.path), buffer[:size], tensor.offset + start, tensor.path)
            if a[:size] != b[:size]:
                hint = "; set tie_word_embeddings to false to keep it" if name == HEAD else ""
                raise CheckpointError(f"{where} differs from {original}{hint}")


class MegatronSource:
    """The model tensors of a torch_dist directory with its hf/ folder, checked against the table of its config."""

    format = "torch_dist"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hf_files = path / HF_FOLDER
        self.files = TorchDistSource(path)
        if not (self.hf_files / "config.json").is_file():
            raise CheckpointError(
                f"{path}: has no {HF_FOLDER}/config.json, so its model is not known; "
                "put the Hugging Face config.json and tokenizer there"
            )
        self.config = read_config(self.hf_files)
        recorded = read_manifest(path)
        self.table: ModelTable = table_for(self.config, recorded.tensors if recorded else self.files.tensors)
        shapes = {n: t.shape for n, t in self.files.tensors.items() if not n.startswith(_NOT_WEIGHTS)}
        if shapes and all(name.startswith(_ADAPTER) for name in shapes):
            raise CheckpointError(
                f"{path}: holds a LoRA adapter and no model weights; give the base model here and the adapter to "
                "--adapters (mswift export writes it, mswift merge folds it in)"
            )
        check_shapes(str(path), shapes, {key: t.shape for key, t in self.table.megatron.items()})
        own = self.table.megatron
        self.dtype = one_dtype(
            str(path), {n: self.files.tensors[n].dtype for n in shapes}, lambda key: own[key].rule.own_dtype
        )
        self.order = self.table.hf_order
        self.dropped: dict[str, str] = {}
        self.repeats: dict[str, str] = {}

    def check_repeats(self, names: Collection[str] | None = None) -> None:
        """There are none here."""

    def dtype_of(self, name: str) -> str:
        """Dtype of one HF tensor; `dtype` but for the few that may have their own."""
        return self.files.tensors[self.table.hf_pieces[name][0].names[1]].dtype

    def places(self, name: str) -> list[Place]:
        """Where the bytes of an HF tensor lie."""
        shape, result = self.table.hf[name], list[Place]()
        for piece in self.table.hf_pieces[name]:
            key = piece.names[1]
            for chunk, _ in self.files.chunks(key).overlapping(piece.hull(1)):
                result += chunk_places(piece, shape, chunk, self.dtype_of(name), self.files.chunk_data(key, chunk))
        return result

    def extents(self) -> dict[str, list[tuple[int, int]]]:
        """File name -> (offset, size) of every chunk of a model tensor in it."""
        result: dict[str, list[tuple[int, int]]] = {}
        for key, tensor in self.table.megatron.items():
            for chunk, _ in self.files.chunks(key).overlapping(Region.full(tensor.shape)):
                _, path, offset = self.files.chunk_data(key, chunk)
                item_bytes = DTYPE_BYTES[self.files.tensors[key].dtype]
                result.setdefault(path.name, []).append((offset, chunk.num_elements * item_bytes))
        return result

    def close(self) -> None:
        """Closes the files."""
        self.files.close()


Source = HfSource | MegatronSource


def open_source(path: Path) -> Source:
    """The weights in that directory; strict: CheckpointError for a missing, extra or misshapen tensor."""
    path = Path(path)
    if (path / METADATA).exists() or any(path.glob("*.distcp")):
        return MegatronSource(path)
    return HfSource(path)


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
            raise CheckpointError(f"{where}: {name} is {dtype}, but {first_name} is {first}; one dtype is expected")
    return first
