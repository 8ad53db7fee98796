"""The pickles of torch checkpoints, read without torch: nothing but plain records is constructed."""

import gc
import pickle
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from mswift.converters.io.pickle_writer import TORCH_DTYPES
from mswift.converters.io.unpickler import Inert, RestrictedUnpickler

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
MOST_AXES = 64
"""Of a torch tensor."""

_MOST_CLASSES = 1000
"""Of one pickle with stand-ins."""


class Record(Inert):
    """An instance of an allowed class, whose state is a dict of its attributes."""

    def field(self, name: str) -> Any:
        """One attribute of the pickled object; KeyError if it has none."""
        if not isinstance(self.state, dict):
            raise KeyError(name)
        return self.state[name]


def _record(name: str) -> type[Record]:
    return type(name, (Record,), {})


class _Storage(NamedTuple):
    storage: str
    key: str
    numel: int


class PickledTensor(NamedTuple):
    """A tensor as a pickle describes it: class, record and length of its storage; first element, shape, strides."""

    storage: str
    key: str
    numel: int
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Dict(dict[Any, Any], Inert):
    """An OrderedDict without the attributes that a pickle sets (a state dict's `_metadata`)."""

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _size(values: Any = ()) -> tuple[int, ...]:
    """torch.Size; UnpicklingError unless they are the sizes or strides of a tensor."""
    if len(values) > MOST_AXES or not all(type(n) is int for n in values):
        raise pickle.UnpicklingError(f"{brief(values)} are not sizes")
    return tuple(values)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> PickledTensor:
    if not isinstance(storage, _Storage) or type(offset) is not int:
        raise pickle.UnpicklingError("it has a tensor without storage or offset")
    return PickledTensor(*storage, offset, _size(size), _size(stride))


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
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _record("layout"),
    ("collections", "OrderedDict"): _ordered_dict,
    ("pathlib", "PosixPath"): _record("PosixPath"),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
}
_DTYPES = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}


_STATE_DICT: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}
"""What a state dict of tensors needs."""

_INERT_PACKAGES = frozenset({"argparse", "megatron", "torch", "numpy", "pathlib", "collections", "enum", "signal"})
"""Classes of these stand in the arguments that Megatron-LM stores; each becomes a `Record`, none is imported."""


class _Unpickler(RestrictedUnpickler):
    def __init__(self, data: bytes, allowed: Mapping[tuple[str, str], Any], *, inert: bool = False) -> None:
        super().__init__(data)
        self._allowed, self._inert = allowed, inert
        self._stand_ins: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and name.endswith("Storage") and name.isalnum():
            return name
        try:
            return self._allowed[module, name]
        except KeyError:
            if self._inert and module.split(".", 1)[0] in _INERT_PACKAGES:
                return self._stand_in(name)
            raise pickle.UnpicklingError(f"it asks for {module:.100}.{name:.100}, which no checkpoint needs") from None

    def _stand_in(self, name: str) -> type[Record]:
        if name not in self._stand_ins:
            if len(self._stand_ins) == _MOST_CLASSES:
                raise pickle.UnpicklingError(f"it asks for more than {_MOST_CLASSES} classes")
            self._stand_ins[name] = _record(name)
        return self._stand_ins[name]

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, _device, numel = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to {brief(kind)}")
        if not (isinstance(storage, str) and isinstance(key, str) and type(numel) is int):
            raise pickle.UnpicklingError("it refers to a storage without name, record or length")
        return _Storage(storage, key, numel)


def load_pickle(data: bytes) -> Any:
    """Unpickles with an allow-list of inert stand-ins; pickle.UnpicklingError for anything else or broken bytes."""
    return _load(data, _ALLOWED)


def load_state_dict(data: bytes) -> Any:
    """Like load_pickle, with an allow-list of what a state dict of tensors needs; they become `PickledTensor`."""
    return _load(data, _STATE_DICT)


def load_arguments(data: bytes) -> Any:
    """Like load_pickle, with more stand-ins: for what Megatron-LM stores beside the tensors."""
    return _load(data, _ALLOWED, inert=True)


@contextmanager
def collector_paused() -> Iterator[None]:
    """While inside, no cycles are looked for: among millions of objects that all stay, a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Brief(reprlib.Repr):
    def repr_instance(self, x: Any, level: int) -> str:
        """Of all but containers, strings and numbers: what a repr of their own would write has no bound."""
        return repr(x) if x is None or isinstance(x, bool | float) else f"<{type(x).__name__}>"


_brief = _Brief()


def brief(value: Any) -> str:
    """A value for a message; nested ones are cut short before they are written out."""
    return _brief.repr(value)[:100]


def _load(data: bytes, allowed: Mapping[tuple[str, str], Any], *, inert: bool = False) -> Any:
    try:
        with collector_paused():
            return _Unpickler(data, allowed, inert=inert).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None
