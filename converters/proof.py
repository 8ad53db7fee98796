"""What the bytes of a checkpoint are, tensor by tensor."""

from mswift.converters.copying import is_transposed, opened
from mswift.converters.io.descriptors import Descriptors
from mswift.converters.measured import Measured, Measuring
from mswift.converters.sources import Source
from mswift.converters.workers import Buffers, InOrder, progress_bar, run_all


def measure(source: Source, num_workers: int, progress: bool) -> dict[str, Measured]:
    """Reads every tensor of a source once, several at a time."""
    found: dict[str, Measured] = {}
    files = Descriptors()
    sizes = {name: source.num_bytes(name) for name in source.order}
    with progress_bar(sum(sizes.values()), "verify", progress) as advance:

        def work(name: str, buffers: Buffers) -> None:
            measuring = Measuring(source.dtype_of(name))
            with opened(source, name, files) as tensor:
                block = buffers.wide if is_transposed(tensor.direct()) else buffers.block
                for low in range(0, tensor.size, len(block)):
                    if buffers.stop.is_set():
                        return
                    view = tensor.read(low, min(tensor.size, low + len(block)), block, buffers.tile)
                    measuring(view)
            found[name] = measuring.result()
            advance(sizes[name])

        largest_first: list[str] = sorted(sizes, key=lambda name: -sizes[name])
        run_all(InOrder(largest_first), work, num_workers)
    files.close()
    return found
