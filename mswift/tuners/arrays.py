"""Whole adapter tensors as arrays of bits: read, compared, moved by the pieces of a family's table."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mswift.converters.layout import Piece, Region
from mswift.converters.plan import DTYPE_BYTES

Bits = npt.NDArray[Any]
"""Elements as unsigned integers of their size: what moves is bits, and NaNs compare equal to themselves."""

Read = Callable[[str, Region, memoryview], None]
"""Fills a buffer with the C-order bytes of a region of a named tensor."""

BITS: Mapping[int, np.dtype[Any]] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


def read_bits(read: Read, name: str, dtype: str, region: Region) -> Bits:
    """A region of a tensor, in its shape."""
    array: Bits = np.empty(region.sizes, BITS[DTYPE_BYTES[dtype]])
    read(name, region, memoryview(array.reshape(-1)).cast("B") if array.size else memoryview(b""))
    return array


def view(array: Bits, piece: Piece, side: int) -> Bits:
    """The elements that a piece covers on one side, one axis for each of its dims: assign to it, or from it."""
    start = array[tuple(slice(i, None) for i in piece.starts[side])]
    strides = [array.strides[dim.axis[side]] * dim.step[side] for dim in piece.dims]
    return np.lib.stride_tricks.as_strided(start, [dim.size for dim in piece.dims], strides)
