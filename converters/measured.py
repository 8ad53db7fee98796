"""What the bytes of a tensor are: their hash, and how many of its elements are not finite."""

from dataclasses import dataclass

from blake3 import blake3

EXPONENT_BITS = {"BF16": (2, 0x7F80), "F16": (2, 0x7C00), "F32": (4, 0x7F800000), "F64": (8, 0x7FF0000000000000)}
"""dtype -> (item bytes, mask of the exponent, which is all ones in infinities and NaNs)."""


@dataclass(frozen=True)
class Measured:
    """One tensor as it was read."""

    blake3: str
    non_finite: int


class Measuring:
    """Takes hash and count of one tensor of that dtype while its bytes pass, in order and in whole elements."""

    def __init__(self, dtype: str) -> None:
        self._dtype, self._hash, self._count = dtype, blake3(), 0

    def __call__(self, data: memoryview) -> None:
        self._hash.update(data)
        self._count += non_finite(self._dtype, data)

    def result(self) -> Measured:
        """Of what has passed."""
        return Measured(self._hash.hexdigest(), self._count)


def non_finite(dtype: str, data: memoryview) -> int:
    """Infinities and NaNs among little-endian elements; 0 for dtypes that have none."""
    if dtype not in EXPONENT_BITS or not data:
        return 0
    import numpy as np  # only where bytes are measured

    item_bytes, mask = EXPONENT_BITS[dtype]
    bits = np.frombuffer(data, f"<u{item_bytes}")
    sign = 1 << (8 * item_bytes - 1)
    if bits.max() < sign | mask and bits.view(f"<i{item_bytes}").max() < mask:  # negative ones, positive ones
        return 0
    return int(np.count_nonzero((bits & mask) == mask))
