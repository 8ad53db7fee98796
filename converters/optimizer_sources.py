"""Where optimizer state is read from: a training checkpoint, megatron-core's own, or files with Hugging Face names.

Every source gives a state both ways: as regions of Megatron tensors, and as the bytes of Hugging Face tensors.
"""

import json
import pickle
import struct
import zipfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from mswift import rundir
from mswift.converters.catalog import read_config
from mswift.converters.io.dcp_metadata import METADATA, read_metadata
from mswift.converters.io.descriptors import Descriptors
from mswift.converters.io.files import PIECE_BYTES, open_read, read_exactly
from mswift.converters.io.safe_pickle import load_pickle
from mswift.converters.io.safetensors import SINGLE, read_header
from mswift.converters.io.side_files import OPTIMIZER_RECORD as RECORD
from mswift.converters.io.stored import StoredTensor
from mswift.converters.io.torch_dist import COMMON, other_name
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Region
from mswift.converters.manifest import read_manifest
from mswift.converters.plan import table_for
from mswift.converters.reader import WeightReader
from mswift.converters.source import check_shapes, read_places
from mswift.converters.sources import HF_FOLDER, Place, chunk_places
from mswift.errors import CheckpointError, ConfigError

FOLDER, RNG = "optimizer", "rng.safetensors"
BLOCK_BYTES = 4 << 20
OURS, CORE = "optimizer.", "optimizer.state."
_CORE_MASTERS = ("param", "fp32_param")
"""megatron-core's names for fp32 weights: of its distributed optimizer, and of the plain one."""
_LAYOUT_BOUND = "optimizer.distributed."


def open_states(path: Path, model_config: Path | None = None) -> "MegatronStates | HfStates":
    """The states in a directory; CheckpointError if there are none, or not for every weight.

    model_config: config.json, or its directory, of a checkpoint that has none.
    """
    if (path / METADATA).exists():
        return MegatronStates(path, model_config)
    if (path / FOLDER).is_dir():
        return HfStates(path)
    raise ConfigError(
        f"--optimizer: {path} holds no optimizer state; give a checkpoint of a full training, or a directory that "
        "mswift convert --optimizer made"
    )


def read_record(path: Path) -> dict[str, Any]:
    """mswift_optimizer.json; CheckpointError if it is missing or damaged."""
    try:
        value: dict[str, Any] = json.loads((path / RECORD).read_text("utf-8"))
        if value["version"] != 1:
            raise CheckpointError(f"{path / RECORD}: version {value['version']}; this mswift reads 1")
        if not all(isinstance(names, dict) for names in value["states"].values()):
            raise ValueError("states")
        step, run = value["step"], value["run"]
        if not (step is None or type(step) is int) or not (run is None or isinstance(run, dict)):
            raise ValueError("step, run")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path / RECORD}: is missing or damaged ({error!r})") from None
    return value


class MegatronStates:
    """`optimizer.<state>.<key>` of a checkpoint, or `optimizer.state.<state>.<key>` as megatron-core writes it.

    step: updates done, None if not known; run: run.json; generators: their states by name; recorded: the hashes that
    the source itself states; dropped: rows that pad the vocabulary, which are no part of any state, with the reason.
    """

    def __init__(self, path: Path, model_config: Path | None = None) -> None:
        self.path = path
        self._files = TorchDistSource(path)
        folder = path / HF_FOLDER
        recorded = read_manifest(path)
        if model_config is None and not (folder / "config.json").is_file():
            raise ConfigError(f"{path}: has no {HF_FOLDER}/config.json; name the model's: --model_config DIR")
        self.table = table_for(
            read_config(model_config or folder, or_file=model_config is not None), recorded.tensors if recorded else ()
        )
        names = [name for name in self._files.tensors if name.startswith(OURS)]
        self._refuse_layout_bound(names)
        core = any(name.startswith(CORE) for name in names)
        self._keys: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        aliases = {other_name(key): key for key in self.table.megatron if other_name(key)}
        for name in names:
            state, _, key = name.removeprefix(CORE if core else OURS).partition(".")
            state = "master" if core and state in _CORE_MASTERS else state
            self._keys[f"{state} {aliases.get(key, key)}"] = name
        self.states = tuple(sorted({entry.partition(" ")[0] for entry in self._keys}))
        self._check()
        has_record = (path / RECORD).is_file()
        self.recorded = read_record(path)["states"] if has_record else {}
        self.run = _read_run(path)
        self.step = self.run["optimizer_step"] if self.run else _core_step(path) if core else None
        self.generators = {n: self._bytes(n) for n in self._files.tensors if n.startswith("rng.")}
        self._tile, self._open = memoryview(bytearray(PIECE_BYTES)), Descriptors()

    def _refuse_layout_bound(self, names: list[str]) -> None:
        bound = [n for n in (*names, *self._files.objects) if n.startswith(_LAYOUT_BOUND)]
        if bound:
            raise CheckpointError(
                f"{self.path}: {bound[0]}: megatron-core's distributed optimizer has written its buffers as this "
                "layout has them (dp_reshardable, dp_zero_gather_scatter), without names of weights; save it there "
                "with --dist-ckpt-optim-fully-reshardable (fully_reshardable), which is read"
            )
        of_others = [name for name in names if ".of." in name]
        if of_others:
            raise CheckpointError(
                f"{self.path}: {of_others[0]}: state by transformers' names, of a rule that needs whole matrices "
                "or of a run that trains a part of the model; it goes on where it was made (the same command continues "
                "it); leave --optimizer out to convert the weights"
            )
        if not names:
            raise ConfigError(f"--optimizer: {self.path} holds no optimizer state (weights alone, or an adapter)")

    def _check(self) -> None:
        shapes = {key: tensor.shape for key, tensor in self.table.megatron.items()}
        for state in self.states:
            own = {e.partition(" ")[2]: n for e, n in self._keys.items() if e.startswith(f"{state} ")}
            found = {key: self._without_padding(key, name) for key, name in own.items()}
            check_shapes(f"{self.path}, state {state}", found, shapes)
            for name in own.values():
                if self._files.tensors[name].dtype != "F32":
                    raise CheckpointError(
                        f"{self.path}: {name} is {self._files.tensors[name].dtype}; optimizer state is carried in F32"
                    )

    def _without_padding(self, key: str, name: str) -> tuple[int, ...]:
        """Shape of a stored state, without the rows that pad the vocabulary."""
        shape = self._files.tensors[name].shape
        tensor = self.table.megatron.get(key)
        if tensor is None or tensor.rule.cut is None or not tensor.rule.cut.uneven:
            return shape
        rows = tensor.shape[0]
        if shape[1:] != tensor.shape[1:] or shape[0] <= rows:
            return shape
        self.dropped[f"{name}[{rows}:{shape[0]}]"] = f"{shape[0] - rows} rows that pad the vocabulary of {rows}"
        return tensor.shape

    def _bytes(self, name: str) -> bytes:
        shape = self._files.tensors[name].shape
        data = bytearray(prod(shape))
        self._files.read(name, Region.full(shape), memoryview(data))
        return bytes(data)

    def read(self, state: str, key: str, region: Region, out: memoryview) -> None:
        """The C-order bytes of a region of a Megatron tensor, fp32."""
        self._files.read(self._keys[f"{state} {key}"], region, out)

    def hf_blocks(self, state: str, name: str) -> Iterator[memoryview]:
        """The bytes of a Hugging Face tensor, fp32, in order."""
        size = prod(self.table.hf[name]) * 4
        places: list[Place] = []
        for piece in self.table.hf_pieces[name]:
            stored = self._keys[f"{state} {piece.names[1]}"]
            for chunk, _ in self._files.chunks(stored).overlapping(piece.hull(1)):
                data = self._files.chunk_data(stored, chunk)
                places += chunk_places(piece, self.table.hf[name], chunk, "F32", data)
        for low in range(0, size, BLOCK_BYTES):
            high = min(size, low + BLOCK_BYTES)
            block = memoryview(bytearray(high - low))
            read_places(f"{self.path}: {state} of {name}", places, low, high, block, self._tile, self._open)
            yield block


class HfStates:
    """optimizer/<state>/, each a directory like that of the model; attributes as those of `MegatronStates`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        record = read_record(path)
        self.states = tuple(sorted(record["states"]))
        folders = sorted(p.name for p in (path / FOLDER).iterdir() if p.is_dir())
        if folders != list(self.states) or not folders:
            raise CheckpointError(f"{path / FOLDER}: holds the states {folders}, {RECORD} lists {list(self.states)}")
        self._readers = {state: WeightReader(path / FOLDER / state) for state in self.states}
        self.table = next(iter(self._readers.values())).table
        for state, reader in self._readers.items():
            if reader.dtype != "F32" or reader.table.spec != self.table.spec:
                raise CheckpointError(f"{path / FOLDER / state}: is {reader.dtype}, or of another model; F32 is needed")
        if read_config(path) != read_config(path / FOLDER / self.states[0]):
            raise CheckpointError(f"{path / FOLDER}: its config.json is not that of the model beside it")
        self._stored = {state: read_header(path / FOLDER / state / SINGLE) for state in self.states}
        self.dropped: dict[str, str] = {}
        self.step, self.run, self.recorded = record["step"], record["run"], record["states"]
        rng = path / FOLDER / RNG
        self.generators = {n: b"".join(_blocks(t)) for n, t in read_header(rng).items()} if rng.is_file() else {}

    def read(self, state: str, key: str, region: Region, out: memoryview) -> None:
        """The C-order bytes of a region of a Megatron tensor, fp32."""
        self._readers[state].read(key, region, out)

    def hf_blocks(self, state: str, name: str) -> Iterator[memoryview]:
        """The bytes of a Hugging Face tensor, fp32, in order."""
        return _blocks(self._stored[state][name])


def _blocks(tensor: StoredTensor) -> Iterator[memoryview]:
    fd = open_read(tensor.path)
    with open(fd, "rb"):
        for low in range(0, tensor.nbytes, BLOCK_BYTES):
            block = memoryview(bytearray(min(BLOCK_BYTES, tensor.nbytes - low)))
            read_exactly(fd, block, tensor.offset + low, tensor.path)
            yield block


def _read_run(path: Path) -> dict[str, Any] | None:
    """run.json of a checkpoint; None in another directory."""
    if not (path / rundir.STATE).is_file():
        return None
    try:
        value: dict[str, Any] = json.loads((path / rundir.STATE).read_text("utf-8"))
        if type(value["optimizer_step"]) is not int:
            raise ValueError("optimizer_step")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / rundir.STATE}: is damaged ({error!r})") from None
    return value


def _core_step(path: Path) -> int | None:
    """Updates done, out of the common.pt of a megatron-core checkpoint, if a restricted unpickler can read it.

    The distributed optimizer has it in its parameter groups, the plain one in a tensor of one element.
    """
    try:
        with zipfile.ZipFile(path / COMMON) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            state = load_pickle(archive.read(name))["optimizer"]
            state = state.get("optimizer", state)
            if "common_step" in state.get("state", {}):
                (data,) = [n for n in archive.namelist() if n.endswith("/data/0")]
                return int(struct.unpack("<f", archive.read(data))[0])
        (step,) = {int(group["step"]) for group in state["param_groups"]}
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, LookupError, TypeError, ValueError, AttributeError,
            struct.error):  # fmt: skip
        return None
    return step


StateSource = MegatronStates | HfStates


def has_states(path: Path) -> bool:
    """Whether a directory holds optimizer state of full weights."""
    if (path / METADATA).exists():
        return any(name.startswith(OURS) for name in read_metadata(path).tensors)
    return (path / RECORD).is_file()
