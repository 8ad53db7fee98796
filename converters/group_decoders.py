"""The arithmetic of GPTQ and AWQ: scale * (code - zero) in float32, of codes packed into 32-bit words.

Both store a weight with its inputs first. GPTQ (Frantar et al. 2022, arXiv 2210.17323; AutoGPTQ's files) packs inputs
into a word, AWQ (Lin et al. 2023, arXiv 2306.00978; AutoAWQ's files) outputs, in an order of its own. Zeros of both
are packed along outputs. Shapes: i inputs, o outputs, g groups of inputs, n outputs of the band that is kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mswift.converters.decode import CodePart
from mswift.converters.decoders import Floats, widen
from mswift.converters.plan import DTYPE_BYTES
from mswift.errors import CheckpointError

Fetch = Callable[[int, int, int], memoryview]
Words = npt.NDArray[np.uint32]
SLAB_BYTES = 16 << 20
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word, from the lowest, hold the code of each of its eight outputs."""


_PAIRS = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1).astype(np.float32).view(np.uint64)[:, 0]
"""The two codes of a byte, as one item, so that they are looked up together."""


class _Grouped(ABC):
    """[o, i] weights, made from qweight, qzeros and scales (inputs 0 to 2).

    sizes: i, o, g and the inputs of a group. part: what is made in place of the weight. Keeps the words of a band of
    outputs (about 16 MiB), so that reading in order fetches every byte once.
    """

    step_elements: ClassVar[int] = 1 << 20
    rows: int
    """Of qweight."""
    _words: Words

    def __init__(
        self, name: str, sizes: tuple[int, int, int, int], scale_dtype: str, bits: int, part: CodePart | None
    ) -> None:
        self._part = part
        self._name, self._scale_dtype, self._bits = name, scale_dtype, bits
        self._inputs, self._outputs, self._groups, self._size = sizes
        self._low = self._high = 0
        self._zeros = self._scales = np.empty((0, 0), np.float32)
        self._group_of: npt.NDArray[np.int32] | None = None

    def __call__(self, first: int, last: int, fetch: Fetch) -> Floats:
        result = np.empty(last - first, np.float32)
        done = first
        while done < last:
            row = done // self._inputs
            self._load(row, fetch)
            end_row = min(self._high, -(-last // self._inputs))
            end, origin = min(last, end_row * self._inputs), row * self._inputs
            values = self._values(row - self._low, end_row - self._low).reshape(-1)
            result[done - first : end - first] = values[done - origin : end - origin]
            done = end
        return result

    def _values(self, low: int, high: int) -> Floats:
        """[n, i] of outputs [low, high) of the band."""
        zeros, scales = self._zeros[:, low:high].T, self._scales[:, low:high].T
        if self._part == "scales":
            return self._by_group(np.add, np.zeros((high - low, self._inputs), np.float32), scales)
        values = self._codes(low, high)
        if self._part == "codes":
            return self._by_group(np.add, values, np.float32(256) * zeros)
        self._by_group(np.subtract, values, zeros)
        with np.errstate(over="ignore"):
            self._by_group(np.multiply, values, scales)
        if self._scale_dtype != "F16" and np.isinf(values).any():
            raise CheckpointError(f"{self._name}.scales: a code times its scale is beyond float32")
        return values

    def _by_group(self, compute: np.ufunc, values: Floats, of_groups: Floats) -> Floats:
        """values [n, i] with that of the group of each, [n, g], in place."""
        if self._group_of is not None:
            compute(values, of_groups[:, self._group_of], out=values)
        elif self._inputs % self._size:
            compute(values, np.repeat(of_groups, self._size, axis=1)[:, : self._inputs], out=values)
        else:
            groups = values.reshape(len(values), -1, self._size)
            compute(groups, of_groups[:, :, None], out=groups)
        return values

    @abstractmethod
    def _codes(self, low: int, high: int) -> Floats:
        """[n, i] codes of outputs [low, high) of the band."""

    @abstractmethod
    def _read_codes(self, low: int, high: int, fetch: Fetch) -> None:
        """Keeps words and zeros of outputs [low, high)."""

    def _load(self, row: int, fetch: Fetch) -> None:
        if self._low <= row < self._high:
            return
        # a multiple of 8 outputs, which is a whole number of words of zeros and of AWQ's weights
        width = max(8, SLAB_BYTES * 8 // (self._inputs * self._bits) // 8 * 8)
        low = row // width * width
        high = min(self._outputs, low + width)
        self._read_codes(low, high, fetch)
        item = DTYPE_BYTES[self._scale_dtype]
        scales = widen(self._scale_dtype, self._columns(2, low * item, high * item, self._outputs * item, fetch))
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{self._name}.scales: holds a scale that is not finite")
        self._scales = scales.reshape(self._groups, high - low)
        self._low, self._high = low, high

    def _columns(self, number: int, low: int, high: int, row_bytes: int, fetch: Fetch) -> memoryview:
        """Bytes [low, high) of every row of an input."""
        rows = self._groups if number else self.rows
        if (low, high) == (0, row_bytes):
            return fetch(number, 0, rows * row_bytes)
        return memoryview(b"".join(fetch(number, r * row_bytes + low, r * row_bytes + high) for r in range(rows)))

    def _columns_of_words(self, number: int, low: int, high: int, per_word: int, fetch: Fetch) -> Words:
        """[rows, n / per_word] words of outputs [low, high)."""
        edges = (4 * (low // per_word), 4 * (high // per_word))
        data = self._columns(number, *edges, 4 * (self._outputs // per_word), fetch)
        return np.frombuffer(data, "<u4").reshape(self._groups if number else self.rows, -1)


class Awq(_Grouped):
    """Four bits; a word of qweight [i, o / 8] and of qzeros [g, o / 8] has eight outputs."""

    def __init__(
        self, name: str, sizes: tuple[int, int, int, int], scale_dtype: str, part: CodePart | None = None
    ) -> None:
        super().__init__(name, sizes, scale_dtype, 4, part)
        self.rows = self._inputs

    def _read_codes(self, low: int, high: int, fetch: Fetch) -> None:
        self._words = self._columns_of_words(0, low, high, 8, fetch)
        self._zeros = _unpacked(self._columns_of_words(1, low, high, 8, fetch), 4, _AWQ_PLACES).astype(np.float32)

    def _codes(self, low: int, high: int) -> Floats:
        first = low // 8
        words = np.ascontiguousarray(self._words[:, first : -(-high // 8)])
        pairs = np.ascontiguousarray(words.view(np.uint8).reshape(len(words), -1, 4).transpose(2, 1, 0))
        codes = np.empty((pairs.shape[1], 8, len(words)), np.float32)
        for output, place in enumerate(_AWQ_PLACES):
            codes[:, output] = pairs[place // 2] >> 4 if place % 2 else pairs[place // 2] & 15
        return codes.reshape(-1, len(words))[low - 8 * first : high - 8 * first]


class Gptq(_Grouped):
    """A word of qweight [i * bits / 32, o] has 32 / bits inputs, one of qzeros [g, o * bits / 32] as many outputs.

    zero_plus: 1 where the files hold each zero less one; zero_wraps: as GPTQModel writes 0 less one. ordered: g_idx [i]
    (input 3) has the group of each input.
    """

    def __init__(
        self,
        name: str,
        sizes: tuple[int, int, int, int],
        scale_dtype: str,
        bits: int,
        zero_plus: int,
        zero_wraps: bool,
        ordered: bool,
        part: CodePart | None = None,
    ) -> None:
        super().__init__(name, sizes, scale_dtype, bits, part)
        self.rows = self._inputs * bits // 32
        self._zero_plus, self._zero_wraps, self._ordered = zero_plus, zero_wraps, ordered

    def _read_codes(self, low: int, high: int, fetch: Fetch) -> None:
        self._words = self._columns_of_words(0, low, high, 1, fetch)
        self._zeros = self._zeros_of(self._columns_of_words(1, low, high, 32 // self._bits, fetch))
        if self._ordered:
            self._read_order(fetch)

    def _read_order(self, fetch: Fetch) -> None:
        """Which group each input is in, where those of a group are not neighbours."""
        self._ordered = False
        groups = np.frombuffer(fetch(3, 0, 4 * self._inputs), "<i4")
        if groups.min() < 0 or groups.max() >= self._groups:
            raise CheckpointError(f"{self._name}.g_idx: holds a group that is not one of the {self._groups}")
        if not np.array_equal(groups, np.arange(self._inputs) // self._size):
            self._group_of = groups

    def _zeros_of(self, words: Words) -> Floats:
        mask = (1 << self._bits) - 1
        if self._zero_plus:
            if not self._zero_wraps and (_unpacked(words, self._bits) == mask).any():
                raise CheckpointError(
                    f"{self._name}.qzeros: holds {mask}, a zero of 0 less one, which programs read in different ways "
                    f"(as 0 or {mask + 1}, with other neighbours): quantise with checkpoint_format gptq_v2"
                )
            words = words + np.uint32(0xFFFFFFFF // mask)  # one to each, as they were subtracted: modulo 2**32
        return _unpacked(words, self._bits).astype(np.float32)

    def _codes(self, low: int, high: int) -> Floats:
        data = np.ascontiguousarray(self._words[:, low:high].T).view(np.uint8)
        if self._bits == 8:
            return data.astype(np.float32)
        return np.take(_PAIRS, data).view(np.float32)


def _unpacked(words: Words, bits: int, places: tuple[int, ...] | None = None) -> Words:
    """[r, w] words -> [r, w * 32 / bits] codes; places: where in a word each code is (the lowest bits first)."""
    shifts = bits * np.array(places or range(32 // bits), np.uint32)
    codes: Words = (words[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.reshape(len(words), -1)
