"""The pickles of torch checkpoints, written and read without torch; reading constructs nothing but plain records."""

import io
import pickle
import reprlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mswift.converters.io.pickle_scan import scan

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"


class Record:
    """Stands for an instance of an allowed class: `args` of its constructor, `state` that pickle would set."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """One attribute of the pickled object; KeyError if it has none."""
        if not isinstance(self.state, dict):
            raise KeyError(name)
        return self.state[name]


def _record(name: str) -> type[Record]:
    return type(name, (Record,), {})


class PickledTensor(NamedTuple):
    """A tensor as a pickle describes it: class, record and length of its storage; first element, shape, strides."""

    storage: str
    key: str
    numel: int
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Dict(dict[Any, Any]):
    """An OrderedDict without the attributes that a pickle sets (a state dict's `_metadata`)."""

    def __setstate__(self, state: Any) -> None:
        pass


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> PickledTensor:
    name, key, numel = storage
    return PickledTensor(name, key, numel, offset, tuple(size), tuple(stride))


def _parameter(data: Any, *_: Any) -> Any:
    """An nn.Parameter is its tensor."""
    return data


_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (_METADATA, n): _record(n)
        for n in (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
            *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        )
    },
    **{(_PLANNER, n): _record(n) for n in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")},
    **{(_FILESYSTEM, n): _record(n) for n in ("_StorageInfo", "_StoragePrefix")},
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _record("layout"),
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): _record("PosixPath"),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
}
TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip
"""torch's name of a dtype, by safetensors' name."""

_DTYPES = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}


_STATE_DICT: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}
"""What a state dict of tensors needs."""

_INERT_PACKAGES = frozenset({"argparse", "megatron", "torch", "numpy", "pathlib", "collections", "enum", "signal"})
"""Classes of these stand in the arguments that Megatron-LM stores; each becomes a `Record`, none is imported."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: Mapping[tuple[str, str], Any], *, inert: bool = False) -> None:
        scan(data)
        super().__init__(io.BytesIO(data))
        self._allowed, self._inert = allowed, inert

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and name.endswith("Storage") and name.isalnum():
            return name
        try:
            return self._allowed[module, name]
        except KeyError:
            if self._inert and module.split(".", 1)[0] in _INERT_PACKAGES:
                return _record(name)
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs") from None

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, _device, numel = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to {kind!r}")
        if not (isinstance(storage, str) and isinstance(key, str) and type(numel) is int):
            raise pickle.UnpicklingError("it refers to a storage without name, record or length")
        return storage, key, numel


def load_pickle(data: bytes) -> Any:
    """Unpickles with an allow-list of inert stand-ins; pickle.UnpicklingError for anything else or broken bytes."""
    return _load(data, _ALLOWED)


def load_state_dict(data: bytes) -> Any:
    """Like load_pickle, with an allow-list of what a state dict of tensors needs; they become `PickledTensor`."""
    return _load(data, _STATE_DICT)


def load_arguments(data: bytes) -> Any:
    """Like load_pickle, with more stand-ins: for what Megatron-LM stores beside the tensors."""
    return _load(data, _ALLOWED, inert=True)


def brief(value: Any) -> str:
    """A value for a message; nested ones are cut short before they are written out."""
    return reprlib.repr(value)[:100]


def _load(data: bytes, allowed: Mapping[tuple[str, str], Any], *, inert: bool = False) -> Any:
    try:
        return _Unpickler(data, allowed, inert=inert).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None


class PickleWriter:
    """Protocol-2 opcodes for plain values and instances of classes named only, without importing them."""

    def __init__(self) -> None:
        self._out = bytearray(b"\x80\x02")
        self._globals: dict[tuple[str, str], int] = {}

    def close(self) -> bytes:
        """The finished pickle."""
        return bytes(self._out + b".")

    def plain(self, value: Any) -> None:
        """None, bool, int, float, str, and tuples, lists, dicts of values or of callables that write one."""
        if callable(value):
            value()
        elif value is None:
            self._out += b"N"
        elif isinstance(value, bool):
            self._out += b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            self._int(value)
        elif isinstance(value, float):
            self._out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            data = value.encode("utf-8")
            self._out += b"X" + struct.pack("<I", len(data)) + data
        elif isinstance(value, tuple):
            self._tuple(value)
        elif isinstance(value, Mapping):
            self._out += b"}("
            for key, item in value.items():
                self.plain(key)
                self.plain(item)
            self._out += b"u"
        elif isinstance(value, Sequence):
            self._out += b"]("
            for item in value:
                self.plain(item)
            self._out += b"e"
        else:
            raise TypeError(f"cannot pickle {type(value).__name__}")

    def items(self, values: Iterable[Any]) -> None:
        """A list whose values are made while it is written."""
        self._out += b"]("
        for value in values:
            self.plain(value)
        self._out += b"e"

    def pairs(self, pairs: Iterable[tuple[Callable[[], None], Any]]) -> None:
        """A dict whose keys are written by callables; pairs are made while it is written."""
        self._out += b"}("
        for key, item in pairs:
            key()
            self.plain(item)
        self._out += b"u"

    def _int(self, n: int) -> None:
        if 0 <= n < 256:
            self._out += b"K" + bytes([n])
        elif 0 <= n < 65536:
            self._out += b"M" + struct.pack("<H", n)
        elif -(2**31) <= n < 2**31:
            self._out += b"J" + struct.pack("<i", n)
        else:
            data = n.to_bytes((n.bit_length() >> 3) + 1, "little", signed=True)
            self._out += b"\x8a" + bytes([len(data)]) + data

    def _tuple(self, items: tuple[Any, ...]) -> None:
        if len(items) > 3:
            self._out += b"("
        for item in items:
            self.plain(item)
        self._out += (b")", b"\x85", b"\x86", b"\x87")[len(items)] if len(items) <= 3 else b"t"

    def global_(self, module: str, name: str) -> None:
        """A class or function by name."""
        known = self._globals.get((module, name))
        if known is not None:
            self._out += b"h" + bytes([known])
            return
        known = self._globals[module, name] = len(self._globals)
        self._out += f"c{module}\n{name}\n".encode() + b"q" + bytes([known])

    def call(self, module: str, name: str, args: tuple[Any, ...]) -> None:
        """The result of calling a global."""
        self.global_(module, name)
        self.plain(args)
        self._out += b"R"

    def instance(self, module: str, name: str, state: Any) -> None:
        """An instance made without __init__, with that state (None: none)."""
        self.global_(module, name)
        self._out += b")\x81"
        if state is not None:
            self.plain(state)
            self._out += b"b"

    def rebuild_tensor(self, storage: str, numel: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        """What torch pickles for a contiguous CPU tensor whose storage is record `data/0`."""

        def persistent() -> None:
            self.plain(("storage", lambda: self.global_("torch", storage), "0", "cpu", numel))
            self._out += b"Q"

        args = (persistent, 0, shape, stride, False, lambda: self.call("collections", "OrderedDict", ()))
        self.call("torch._utils", "_rebuild_tensor_v2", args)
