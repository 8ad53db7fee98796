"""Pickles of torch checkpoints written without torch: protocol-2 opcodes."""

import struct
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip
"""torch's name of a dtype, by safetensors' name."""


class PickleWriter:
    """Protocol-2 opcodes for plain values and instances of classes named only, without importing them."""

    def __init__(self) -> None:
        self._out = bytearray(b"\x80\x02")
        self._memo: dict[Hashable, int] = {}

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
            self._once(value, lambda: self._text(value))
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
        self._once((module, name), lambda: self._out.extend(f"c{module}\n{name}\n".encode()))

    def _text(self, value: str) -> None:
        data = value.encode("utf-8")
        self._out += b"X" + struct.pack("<I", len(data)) + data

    def _once(self, key: Hashable, write: Callable[[], None]) -> None:
        """`write` the first time, afterwards a reference to it: a name stands in thousands of chunks."""
        known = self._memo.get(key)
        if known is None:
            write()
            known = self._memo[key] = len(self._memo)
            self._out += b"q" + bytes([known]) if known < 256 else b"r" + struct.pack("<I", known)
        else:
            self._out += b"h" + bytes([known]) if known < 256 else b"j" + struct.pack("<I", known)

    def size(self, values: tuple[int, ...]) -> None:
        """A torch.Size; equal ones are one object, as they are in most chunks of a checkpoint."""
        self._once(values, lambda: self.call("torch", "Size", (values,)))

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
