"""Tensors whose bytes are made while reading: what is decoded, out of which stored tensors, by which rule.

No arithmetic here (decoders.py and group_decoders.py have it): a conversion without decodings imports no numpy.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from typing import Any, Literal, Protocol

from mswift.converters.plan import DTYPE_BYTES, WEIGHT_DTYPES
from mswift.errors import CheckpointError

Fetch = Callable[[int, int, int], memoryview]
"""(number of a stored tensor, low, high) -> its bytes [low, high)."""

CodePart = Literal["codes", "scales"]
"""Of a weight of integer codes: code + 256 * zero of each element, or its scale."""

DTYPE_NAMES: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_LARGEST: Mapping[str, float] = {"F32": 3.4028235e38, "BF16": 3.3895314e38, "F16": 65504.0}


class HasShape(Protocol):
    """What is read of a stored tensor here."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Decoding:
    """How an HF tensor is made: from which stored tensors, by which rule (for the manifest), into which dtype.

    decoder: "module.Class" of this package and its arguments; an instance makes elements [first, last) as float32.
    scale_dtype: of stored scales, where integer codes are what it is made of ("": it is not).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    rule: str
    decoder: tuple[str, tuple[Any, ...]]
    scale_dtype: str = ""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def of(self, part: CodePart) -> "Decoding":
        """Of another part than the weight: of each element its code and zero, or its scale, in float32."""
        assert self.scale_dtype, self.name
        name, arguments = self.decoder
        return replace(self, dtype="F32", decoder=(name, (*arguments, part)))


class DecodedBytes:
    """An HF tensor as a stream of bytes that are made while reading; one thread."""

    def __init__(self, decoding: Decoding, fetch: Fetch) -> None:
        self._decoding, self._fetch = decoding, fetch
        from mswift.converters import decoders  # numpy: only where it is needed

        self._decoders = decoders
        (module, _, name), arguments = decoding.decoder[0].partition("."), decoding.decoder[1]
        self._values = getattr(import_module(f"mswift.converters.{module}"), name)(*arguments)

    def read(self, low: int, high: int, block: memoryview) -> memoryview:
        """Bytes [low, high), in `block`; CheckpointError for a finite value that the dtype cannot hold."""
        decoding, item = self._decoding, DTYPE_BYTES[self._decoding.dtype]
        if low % item or high % item:
            raise ValueError(f"{decoding.name}: bytes {low}:{high} cut an element of {item} bytes")
        step = self._values.step_elements * item
        for start in range(low, high, step):
            end = min(high, start + step)
            self._part(start // item, end // item, block[start - low : end - low])
        return block[: high - low]

    def _part(self, first: int, last: int, view: memoryview) -> None:
        """Elements [first, last) into view."""
        decoding = self._decoding
        values = self._values(first, last, self._fetch)
        self._decoders.encode(values, decoding.dtype, view)
        lost = self._decoders.lost(values, decoding.dtype, view)
        if len(lost):
            at, index = first + int(lost[0]), list[int]()
            for n in reversed(decoding.shape):
                at, i = divmod(at, n)
                index.insert(0, i)
            raise CheckpointError(
                f"{decoding.name}{index} is {float(values[lost[0]]):.9g}: {decoding.dtype} holds at most "
                f"{_LARGEST[decoding.dtype]:.9g} ({len(lost):,} of the {len(values):,} elements around it would become "
                "infinite); give --dtype bfloat16 or float32"
            )


def cast(name: str, stored: HasShape, dtype: str) -> Decoding:
    """An F32, BF16 or F16 tensor in another of these dtypes."""
    if stored.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(f"{name} is {stored.dtype}; only {', '.join(WEIGHT_DTYPES)} can be cast")
    rule = f"{stored.dtype} cast to {dtype}"
    return Decoding(name, dtype, stored.shape, (name,), rule, ("decoders.Plain", (stored.dtype,)))
