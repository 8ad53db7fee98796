"""Threads that work through a list, each with its own buffers; the first failure stops all of them."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Lock, Thread
from typing import Any, TypeVar

from mswift.converters.io.files import PIECE_BYTES

Item = TypeVar("Item")
_WRITEBACK_SECONDS = 0.2


class Buffers:
    """One worker's memory: a block of a tensor on each side of a comparison, and a tile for strided copies."""

    def __init__(self) -> None:
        self.block, self.other, self.tile = (memoryview(bytearray(PIECE_BYTES)) for _ in range(3))


def default_workers() -> int:
    """One more than the processors of this process (one always waits for the disk), at most 8."""
    return min(8, len(os.sched_getaffinity(0)) + 1)


def run_all(items: Iterable[Item], work: Callable[[Item, Buffers], None], num_workers: int) -> None:
    """Calls work(item, buffers) for every item, in order of start; raises the first error."""
    queue, lock, stop = iter(items), Lock(), Event()

    def loop() -> None:
        buffers = Buffers()
        while not stop.is_set():
            with lock:
                item = next(queue, None)
            if item is None:
                return
            try:
                work(item, buffers)
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(num_workers) as pool:
        futures = [pool.submit(loop) for _ in range(num_workers)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            raise


@contextmanager
def early_writeback(fds: Sequence[int]) -> Iterator[None]:
    """Sends files to the disk while the block still writes them, so that the last fsync finds little left.

    Raises what fsync raised (a full disk may only show there).
    """
    stop = Event()
    errors: list[OSError] = []

    def loop() -> None:
        while not stop.wait(_WRITEBACK_SECONDS):
            for fd in fds:
                try:
                    os.fsync(fd)
                except OSError as error:  # told once for each descriptor: the fsync at the end would not see it
                    errors.append(error)
                    return

    thread = Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
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
