"""The arithmetic of decodings: FP8 and MXFP4 weights, and casts between F32, BF16 and F16.

Every decoder works on a range of the elements of its tensor in C order, so memory is bounded by the range (about
`step_elements` at a time: arrays beyond the caches are slower). Values are float32, exact for every format read here
but for the product with an FP8 scale, which is rounded once, as DeepSeek's own kernel does; then they are rounded to
the wanted dtype, to nearest, ties to even.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mswift.converters.plan import DTYPE_BYTES
from mswift.errors import CheckpointError

Floats = npt.NDArray[np.float32]
Fetch = Callable[[int, int, int], memoryview]
_SLAB_BYTES = 16 << 20


def widen(dtype: str, data: memoryview) -> Floats:
    """F32, BF16 or F16 bytes as float32, exactly."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def narrow(values: Floats, dtype: str) -> npt.NDArray[Any]:
    """float32 rounded to a dtype, to nearest, ties to even; a NaN stays one (BF16: 0x7fc0)."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore", under="ignore"):
            return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    result = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        result[nan] = 0x7FC0
    return result


_EXPONENTS = {"F32": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)}


def lost(values: Floats, dtype: str, data: memoryview) -> npt.NDArray[Any]:
    """Indices of finite values whose bytes in that dtype are infinite."""
    layout, mask = _EXPONENTS[dtype]
    special = (np.frombuffer(data, layout) & mask) == mask
    return np.flatnonzero(special & np.isfinite(values)) if special.any() else np.empty(0, np.int64)


def encode(values: Floats, dtype: str, out: memoryview) -> None:
    """The bytes of the values in that dtype."""
    out[:] = memoryview(np.ascontiguousarray(narrow(values, dtype)).view(np.uint8))


@dataclass(frozen=True)
class Plain:
    """A tensor in another dtype."""

    dtype: str
    step_elements: ClassVar[int] = 1 << 17

    def __call__(self, first: int, last: int, fetch: Fetch) -> Floats:
        item = DTYPE_BYTES[self.dtype]
        return widen(self.dtype, fetch(0, first * item, last * item))


def _e4m3() -> Floats:
    """Value of every byte as float8_e4m3fn (OCP 8-bit floating point, E4M3: bias 7, no infinities)."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[(exponent == 15) & (mantissa == 7)] = np.nan
    return np.where(code & 128, -size, size).astype(np.float32)


E4M3 = _e4m3()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_E2M1_PAIRS = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=1).view(np.uint64)[:, 0]
"""Two values by byte, as one item, so that they are looked up together."""


@dataclass(frozen=True)
class Fp8Blocks:
    """[rows, columns] F8_E4M3 (input 0) times the scale of its block (input 1: [rows / block, columns / block])."""

    name: str
    columns: int
    block: tuple[int, int]
    scale_dtype: str
    step_elements: ClassVar[int] = 1 << 17

    def __call__(self, first: int, last: int, fetch: Fetch) -> Floats:
        values = np.take(E4M3, np.frombuffer(fetch(0, first, last), np.uint8))
        if first == last:
            return values
        across = -(-self.columns // self.block[1])
        item = DTYPE_BYTES[self.scale_dtype] * across
        top, bottom = (first // self.columns) // self.block[0], ((last - 1) // self.columns) // self.block[0] + 1
        scales = widen(self.scale_dtype, fetch(1, top * item, bottom * item)).reshape(-1, across)
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{self.name}_scale_inv: holds a scale that is not finite")
        with np.errstate(over="ignore"):
            for band in range(top, bottom):
                wide = np.repeat(scales[band - top], self.block[1])[: self.columns]
                start = max(first, band * self.block[0] * self.columns)
                end = min(last, (band + 1) * self.block[0] * self.columns)
                self._scale(values[start - first : end - first], start % self.columns, wide)
        if np.isinf(values).any():
            raise CheckpointError(f"{self.name}: a weight times its scale is beyond float32")
        return values

    def _scale(self, values: Floats, column: int, wide: Floats) -> None:
        """In place; values begin in that column and run over rows."""
        head = min(len(values), (self.columns - column) % self.columns)
        values[:head] *= wide[column : column + head]
        rows = (len(values) - head) // self.columns
        body = values[head : head + rows * self.columns].reshape(rows, self.columns)
        body *= wide
        tail = values[head + rows * self.columns :]
        tail *= wide[: len(tail)]


@dataclass
class Mxfp4:
    """[experts, 32 * groups, rows] from blocks [experts, rows, groups, 16] (input 0; low nibble first) and scales
    [experts, rows, groups] (input 1; 2 ** (byte - 127)): the transpose of what is stored.

    Keeps one band of one expert's blocks (at most 16 MiB), so that reading in order fetches every byte once.
    """

    name: str
    rows: int
    groups: int
    step_elements: ClassVar[int] = 1 << 20
    _at: tuple[int, int, int] = (-1, 0, 0)
    _blocks: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    _scales: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))

    def __call__(self, first: int, last: int, fetch: Fetch) -> Floats:
        result = np.empty(last - first, np.float32)
        columns = 32 * self.groups
        done = first
        while done < last:
            expert, inside = divmod(done, columns * self.rows)
            group = inside // self.rows // 32
            self._load(expert, group, fetch)
            end_group = min(self._at[2], -(-(last - done + inside) // (32 * self.rows)))
            origin = (expert * columns + 32 * group) * self.rows
            end = min(last, (expert * columns + 32 * end_group) * self.rows)
            result[done - first : end - first] = self._decode(group, end_group)[done - origin : end - origin]
            done = end
        return result

    def _load(self, expert: int, group: int, fetch: Fetch) -> None:
        held, low, high = self._at
        if held == expert and low <= group < high:
            return
        width = max(1, min(self.groups, _SLAB_BYTES // (16 * self.rows)))
        low = group // width * width
        high = min(self.groups, low + width)
        starts = [(expert * self.rows + r) * self.groups for r in range(self.rows)]
        parts: list[npt.NDArray[np.uint8]] = []
        for number, size in ((0, 16), (1, 1)):
            if width == self.groups:
                data = fetch(number, starts[0] * size, (starts[-1] + self.groups) * size)
            else:
                data = memoryview(b"".join(fetch(number, (s + low) * size, (s + high) * size) for s in starts))
            parts.append(np.frombuffer(data, np.uint8))
        self._at = (expert, low, high)
        self._blocks = parts[0].reshape(self.rows, high - low, 16)
        self._scales = parts[1].reshape(self.rows, high - low)

    def _decode(self, group: int, end: int) -> Floats:
        """Columns of groups [group, end): [32 * groups * rows], column after column."""
        low = self._at[1]
        scales = self._scales[:, group - low : end - low]
        if (scales == 255).any():
            raise CheckpointError(f"{self.name}_scales: holds 255, which is not a number in e8m0")
        values = np.take(_E2M1_PAIRS, self._blocks[:, group - low : end - low]).view(np.float32)
        with np.errstate(over="ignore"):
            values *= np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[:, :, None]
        if np.isinf(values).any():
            raise CheckpointError(f"{self.name}: a value times its scale is beyond float32")
        return values.reshape(self.rows, -1).T.reshape(-1)
