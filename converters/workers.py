"""Threads that work through a list, each with its own buffers; the first failure stops all of them."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from threading import Event, Lock, Thread
from typing import Any, Generic, Protocol, TypeVar

from mswift.converters.io.files import PIECE_BYTES, WIDE_BYTES

_ALL_WIDE_BYTES = 64 << 20
"""Of the wide blocks of all workers together, unless PIECE_BYTES each is more."""

Item = TypeVar("Item")
Given = TypeVar("Given", covariant=True)


class Queue(Protocol[Given]):
    """Gives out work; called by several threads."""

    def take(self, worker: int) -> Given | None:
        """The next item of that worker (from 0), None if there is none left."""


class InOrder(Generic[Item]):
    """A queue that gives each item to whoever asks first."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items, self._lock = iter(items), Lock()

    def take(self, worker: int) -> Item | None:
        """The next item."""
        with self._lock:
            return next(self._items, None)


class Buffers:
    """One worker's memory: a block of a tensor on each side of a comparison, and a tile for strided copies.

    `wide` and `other_wide` are larger blocks, made when a transposed tensor first needs them, smaller where there are
    many workers (`of`). `stop` is set when the work is to end early, between two spans.
    """

    def __init__(self, stop: Event | None = None, of: int = 1) -> None:
        self.stop = stop or Event()
        self._wide_bytes = max(PIECE_BYTES, min(WIDE_BYTES, _ALL_WIDE_BYTES // of))
        self.block, self.other, self.tile = (memoryview(bytearray(PIECE_BYTES)) for _ in range(3))

    @cached_property
    def wide(self) -> memoryview:
        return memoryview(bytearray(self._wide_bytes))

    @cached_property
    def other_wide(self) -> memoryview:
        return memoryview(bytearray(self._wide_bytes))


def default_workers() -> int:
    """One more than the processors of this process (one always waits for the disk), at most 8."""
    return min(8, len(os.sched_getaffinity(0)) + 1)


def run_all(queue: Queue[Item], work: Callable[[Item, Buffers], None], num_workers: int) -> None:
    """Calls work(item, buffers) for every item; raises the first error, after all workers have stopped."""
    stop = Event()
    errors: list[BaseException] = []

    def loop(worker: int) -> None:
        try:
            buffers = Buffers(stop, num_workers)
            while not stop.is_set():
                item = queue.take(worker)
                if item is None:
                    return
                work(item, buffers)
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [Thread(target=loop, args=(n,), daemon=True) for n in range(num_workers)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # Ctrl-C; a second one does not wait for the workers
        stop.set()
        for thread in threads:
            if thread.is_alive():
                thread.join()
        raise
    if errors:
        raise errors[0]


@contextmanager
def progress_bar(total_bytes: int, label: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields advance(bytes); draws only if `shown` and stderr is a terminal."""
    if not shown or not sys.stderr.isatty():
        yield lambda count: None
        return
    from tqdm import tqdm

    lock = Lock()
    bar: Any = tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True)

    def advance(count: int) -> None:
        with lock:
            bar.update(count)

    with bar:
        yield advance
