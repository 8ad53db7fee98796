"""What the bytes of a checkpoint are: the hash of every tensor, and how many of its elements are not finite."""

from dataclasses import dataclass

from blake3 import blake3

from mswift.converters.copying import is_transposed, opened
from mswift.converters.io.descriptors import Descriptors
from mswift.converters.sources import Source
from mswift.converters.workers import Buffers, InOrder, progress_bar, run_all

EXPONENT_BITS = {"BF16": (2, 0x7F80), "F16": (2, 0x7C00), "F32": (4, 0x7F800000), "F64": (8, 0x7FF0000000000000)}
"""dtype -> (item bytes, mask of the exponent, which is all ones in infinities and NaNs)."""


@dataclass(frozen=True)
class Measured:
    """One tensor as it was read."""

    blake3: str
    non_finite: int


def measure(source: Source, num_workers: int, progress: bool) -> dict[str, Measured]:
    """Reads every tensor of a source once, several at a time."""
    found: dict[str, Measured] = {}
    files = Descriptors()
    sizes = {name: source.num_bytes(name) for name in source.order}
    with progress_bar(sum(sizes.values()), "verify", progress) as advance:

        def work(name: str, buffers: Buffers) -> None:
            dtype, digest, count = source.dtype_of(name), blake3(), 0
            with opened(source, name, files) as tensor:
                block = buffers.wide if is_transposed(tensor.direct()) else buffers.block
                for low in range(0, tensor.size, len(block)):
                    if buffers.stop.is_set():
                        return
                    view = tensor.read(low, min(tensor.size, low + len(block)), block, buffers.tile)
                    digest.update(view)
                    count += non_finite(dtype, view)
            found[name] = Measured(digest.hexdigest(), count)
            advance(sizes[name])

        largest_first: list[str] = sorted(sizes, key=lambda name: -sizes[name])
        run_all(InOrder(largest_first), work, num_workers)
    files.close()
    return found


def non_finite(dtype: str, data: memoryview) -> int:
    """Infinities and NaNs among little-endian elements; 0 for dtypes that have none."""
    if dtype not in EXPONENT_BITS:
        return 0
    import numpy as np

    item_bytes, mask = EXPONENT_BITS[dtype]
    bits = np.frombuffer(data, f"<u{item_bytes}")
    return int(np.count_nonzero((bits & mask) == mask))
