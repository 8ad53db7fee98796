"""Open files by path: a bounded number of descriptors, the least recently used closed first."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from mswift.converters.io.files import open_read

MOST_OPEN = 256
"""Descriptors of one pool while fewer are in use at once; the usual limit of a process is 1024."""


class _Open:
    def __init__(self, fd: int) -> None:
        self.fd, self.users = fd, 0


class Descriptors:
    """Descriptors of files that are read; thread-safe. A descriptor in use is never closed."""

    def __init__(self, limit: int = MOST_OPEN) -> None:
        self._limit, self._lock = limit, Lock()
        self._open: OrderedDict[Path, _Open] = OrderedDict()
        self.most_open = 0

    def opened(self, path: Path) -> int:
        """A new descriptor of the file."""
        return open_read(path)

    @contextmanager
    def held(self, paths: Iterable[Path]) -> Iterator[dict[Path, int]]:
        """Descriptors of all these files, open while the block runs."""
        mine: dict[Path, _Open] = {}
        try:
            with self._lock:
                for path in paths:
                    if path not in mine:
                        mine[path] = self._take(path)
            yield {path: each.fd for path, each in mine.items()}
        finally:
            with self._lock:
                for each in mine.values():
                    each.users -= 1

    def _take(self, path: Path) -> _Open:
        found = self._open.get(path)
        if found is None:
            surplus = max(0, len(self._open) + 1 - self._limit)
            for old in [p for p, each in self._open.items() if not each.users][:surplus]:
                os.close(self._open.pop(old).fd)
            found = self._open[path] = _Open(self.opened(path))
            self.most_open = max(self.most_open, len(self._open))
        self._open.move_to_end(path)
        found.users += 1
        return found

    def close(self) -> None:
        """Closes all of them."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1].fd)

    def __del__(self) -> None:
        self.close()


class SizedFiles(Descriptors):
    """Files of known size that are written in any order, created when they are first used."""

    def __init__(self, directory: Path, sizes: dict[str, int], limit: int = MOST_OPEN) -> None:
        super().__init__(limit)
        self.directory, self.sizes = directory, sizes

    def opened(self, path: Path) -> int:
        """Creates the file with its final size, or opens what is there."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if os.fstat(fd).st_size != self.sizes[path.name]:
                os.ftruncate(fd, self.sizes[path.name])
        except BaseException:
            os.close(fd)
            raise
        return fd
