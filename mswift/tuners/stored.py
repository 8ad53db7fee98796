"""Stored floats as numpy has them: bfloat16, which it lacks, is held as uint16, the upper half of a float32."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

STORED: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""numpy's dtype by that of the file."""


def as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Stored values as numbers; exact."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def as_stored(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Numbers in a file's dtype, rounded to the nearest, ties to even."""
    if dtype != "BF16":
        return values.astype(STORED[dtype])
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
