"""The bytes of one HF tensor: read as a stream from where a source holds them, written to where a destination does."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mswift.converters.decode import DecodedBytes
from mswift.converters.io.descriptors import Descriptors
from mswift.converters.io.files import PIECE_BYTES
from mswift.converters.io.strided import cut, gather, run_bytes, runs, scatter
from mswift.converters.source import Place, Source, fetch_from
from mswift.converters.workers import Buffers
from mswift.errors import CheckpointError

DIRECT_RUN_BYTES = 64 << 10
"""Shorter runs are gathered in memory: one copy_file_range each would cost more than the copy."""

_SHORTEST_RUN_BYTES = 64

_NOT_DIRECT = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EPERM, errno.ETXTBSY)


@dataclass(frozen=True)
class TensorBytes:
    """An HF tensor of a source as a stream of bytes: places with their files open."""

    name: str
    size: int
    places: Sequence[Place]

    def read(self, low: int, high: int, block: memoryview, tile: memoryview) -> memoryview:
        """Bytes [low, high), in `block`; CheckpointError if the source lacks some of them."""
        view, count = block[: high - low], 0
        for place in self.places:
            for part in cut(place.copy, low, high):
                count += gather(place.fd, place.path, part, view, low, tile)
        if count != high - low:
            raise CheckpointError(f"{self.name}: the source has {count} of the bytes {low}:{high}")
        return view

    def direct(self) -> Sequence[Place] | None:
        """Where the very bytes of this stream lie in files; None if they are made while reading."""
        return self.places


@dataclass(frozen=True)
class DecodedTensor(TensorBytes):
    """An HF tensor whose bytes are made while reading."""

    made: DecodedBytes

    def read(self, low: int, high: int, block: memoryview, tile: memoryview) -> memoryview:
        """Bytes [low, high), in `block`."""
        return self.made.read(low, high, block)

    def direct(self) -> None:
        """In no file."""


@contextmanager
def opened(
    source: Source, name: str, files: Descriptors, places_of: Callable[[str], Sequence[Place]] | None = None
) -> Iterator[TensorBytes]:
    """The bytes of an HF tensor of a source; `places_of`: the source's places, remembered."""
    places_of, size = places_of or source.places, source.num_bytes(name)
    decoding = source.decoding(name)
    if decoding is None:
        with placed(places_of(name), files) as places:
            yield TensorBytes(name, size, places)
        return
    stored = {each: places_of(each) for each in decoding.inputs}
    yield DecodedTensor(name, size, (), DecodedBytes(decoding, fetch_from(list(stored.items()), files)))


@contextmanager
def placed(places: Sequence[Place], files: Descriptors) -> Iterator[list[Place]]:
    """The places with open descriptors of `files`."""
    with files.held([place.path for place in places]) as fds:
        yield [Place(place.path, place.copy, fds[place.path]) for place in places]


def write_span(data: memoryview, low: int, places: Sequence[Place], tile: memoryview) -> int:
    """Writes bytes of a tensor that begin at position `low`; returns bytes written, at every place."""
    count = 0
    for place in places:
        for part in cut(place.copy, low, low + len(data)):
            count += scatter(place.fd, part, data, low, tile)
    return count


def is_transposed(*sides: Sequence[Place] | None) -> bool:
    """Whether single elements, not runs of them, are next to each other in both the tensor and a file."""
    return any(run_bytes(place.copy) < _SHORTEST_RUN_BYTES for places in sides for place in places or ())


def copy_span(tensor: TensorBytes, low: int, high: int, places: Sequence[Place], buffers: Buffers) -> None:
    """Moves bytes [low, high) of a tensor to the places of a destination, inside the kernel where the runs are long."""
    written = 0
    source = tensor.direct()
    if source is not None and _long_runs(source) and _long_runs(places):
        written = _copy_direct(source, low, high, places)
    if written == 0:
        written = stream(tensor, low, high, places, buffers, lambda view: None)
    check_written(tensor.name, written, high - low)


def stream(
    tensor: TensorBytes,
    low: int,
    high: int,
    places: Sequence[Place],
    buffers: Buffers,
    look: Callable[[memoryview], object],
) -> int:
    """Reads bytes [low, high) of a tensor, shows them to `look` in order, writes them; returns bytes written."""
    written = 0
    block = buffers.wide if is_transposed(tensor.direct(), places) else buffers.block
    for start in range(low, high, len(block)):
        view = tensor.read(start, min(high, start + len(block)), block, buffers.tile)
        look(view)
        written += write_span(view, start, places, buffers.tile)
    return written


def check_written(name: str, written: int, expected: int) -> None:
    """CheckpointError unless every byte went to every place."""
    if written != expected:
        raise CheckpointError(f"{name}: {written:,} bytes were written, not {expected:,}")


def _long_runs(places: Sequence[Place]) -> bool:
    return all(run_bytes(place.copy) >= DIRECT_RUN_BYTES for place in places)


def _copy_direct(sources: Sequence[Place], low: int, high: int, places: Sequence[Place]) -> int:
    """copy_file_range from run to run; returns bytes written, 0 if the file systems cannot do it."""
    written = 0
    for place in places:
        for part in cut(place.copy, low, high):
            for first, offset, length in runs(part):
                for source in sources:
                    for run, position, size in _overlaps(source, first, first + length):
                        if not _copy_range(source, place, position, offset + run - first, size, written):
                            return 0
                        written += size
    return written


def _overlaps(source: Place, low: int, high: int) -> Iterator[tuple[int, int, int]]:
    """(position in the tensor, position in the file, length) of the source's runs inside [low, high)."""
    for part in cut(source.copy, low, high):
        yield from runs(part)


def _copy_range(source: Place, to: Place, position: int, offset: int, size: int, before: int) -> bool:
    done = 0
    while done < size:
        count = min(PIECE_BYTES, size - done)
        try:
            moved = os.copy_file_range(source.fd, to.fd, count, position + done, offset + done)
        except OSError as error:
            if before + done == 0 and error.errno in _NOT_DIRECT:
                return False
            raise
        if moved == 0:
            raise CheckpointError(f"{source.path}: ends at byte {position + done}; the file is truncated")
        done += moved
    return True
