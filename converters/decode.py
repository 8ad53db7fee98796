"""Tensors whose bytes are made while reading: what is decoded, out of which stored tensors, by which rule.

No arithmetic here (decoders.py has it), so that a conversion without decodings does not import numpy.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

from mswift.converters.plan import DTYPE_BYTES, WEIGHT_DTYPES
from mswift.converters.quantization import Quantization
from mswift.errors import CheckpointError

Fetch = Callable[[int, int, int], memoryview]
"""(number of a stored tensor, low, high) -> its bytes [low, high)."""

DTYPE_NAMES: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_LARGEST: Mapping[str, float] = {"F32": 3.4028235e38, "BF16": 3.3895314e38, "F16": 65504.0}
_SCALES = ("F32", "BF16")


class HasShape(Protocol):
    """What is read of a stored tensor here."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Decoding:
    """How an HF tensor is made: from which stored tensors, by which rule (for the manifest), into which dtype.

    decoder: class in decoders.py and its arguments; an instance makes elements [first, last) as float32.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    rule: str
    decoder: tuple[str, tuple[Any, ...]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class DecodedBytes:
    """An HF tensor as a stream of bytes that are made while reading; one thread."""

    def __init__(self, decoding: Decoding, fetch: Fetch) -> None:
        self._decoding, self._fetch = decoding, fetch
        from mswift.converters import decoders  # numpy: only where it is needed

        self._decoders = decoders
        name, arguments = decoding.decoder
        self._values = getattr(self._decoders, name)(*arguments)

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


def dequantised(stored: Mapping[str, HasShape], how: Quantization, dtype: str) -> dict[str, Decoding]:
    """The decodings of the quantised tensors, into dtype, by HF name; CheckpointError for parts that do not fit."""
    if how.method == "fp8":
        found = [_fp8(name, stored, how.block, dtype) for name in stored if stored[name].dtype == "F8_E4M3"]
    else:
        found = [_mxfp4(name, stored, dtype) for name in stored if name.endswith("_blocks")]
    return {decoding.name: decoding for decoding in found}


def _fp8(name: str, stored: Mapping[str, HasShape], block: tuple[int, int], dtype: str) -> Decoding:
    shape, scale = stored[name].shape, stored.get(name + "_scale_inv")
    if scale is None or len(shape) != 2:
        raise CheckpointError(f"{name}: is F8_E4M3 {list(shape)} without a {name}_scale_inv for its blocks")
    expected = tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
    if scale.shape != expected or scale.dtype not in _SCALES:
        raise CheckpointError(
            f"{name}_scale_inv: is {scale.dtype} {list(scale.shape)}; {list(shape)} in blocks of {list(block)} "
            f"needs F32 {list(expected)}"
        )
    rule = f"F8_E4M3 times {scale.dtype} scale of each {block[0]}x{block[1]} block, rounded to {dtype}"
    decoder = ("Fp8Blocks", (name, shape[1], block, scale.dtype))
    return Decoding(name, dtype, shape, (name, name + "_scale_inv"), rule, decoder)


def _mxfp4(blocks_name: str, stored: Mapping[str, HasShape], dtype: str) -> Decoding:
    name, blocks = blocks_name.removesuffix("_blocks"), stored[blocks_name]
    scales = stored.get(name + "_scales")
    fits = blocks.dtype == "U8" and len(blocks.shape) == 4 and blocks.shape[3] == 16
    if not fits or scales is None or (scales.dtype, scales.shape) != ("U8", blocks.shape[:3]):
        theirs = "absent" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        raise CheckpointError(
            f"{blocks_name}: is {blocks.dtype} {list(blocks.shape)}, its {name}_scales {theirs}; MXFP4 has U8 "
            "[experts, rows, groups, 16] and U8 [experts, rows, groups]"
        )
    experts, rows, groups, _ = blocks.shape
    rule = f"MXFP4 (e2m1 times the e8m0 scale of each 32), transposed, rounded to {dtype}"
    shape, inputs = (experts, 32 * groups, rows), (blocks_name, name + "_scales")
    return Decoding(name, dtype, shape, inputs, rule, ("Mxfp4", (name, rows, groups)))


def cast(name: str, stored: HasShape, dtype: str) -> Decoding:
    """An F32, BF16 or F16 tensor in another of these dtypes."""
    if stored.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(f"{name} is {stored.dtype}; only {', '.join(WEIGHT_DTYPES)} can be cast")
    rule = f"{stored.dtype} cast to {dtype}"
    return Decoding(name, dtype, stored.shape, (name,), rule, ("Plain", (stored.dtype,)))
