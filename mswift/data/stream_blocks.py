"""The blocks of a stream on the disk: each is made in a thread of one process a machine, one ahead of those in use.

Block N of a stream is the folder N: block.json (the place behind its rows) and, unless no row of it gave a sample, an
entry as of the token cache. It appears by a rename, so the other processes wait for its name and need no message; the
file `failed` beside the blocks tells them why there will be none. What a block holds is a function of the place where
it begins, so one that was removed can be made again.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mswift.data.cache import REJECTED, StoreWriter, TokenStore, open_store
from mswift.data.formats import Record
from mswift.data.partial import sole_builder
from mswift.data.places import Bounds, Cursor, Place
from mswift.data.report import FileReport
from mswift.errors import DataError, MswiftError

_BLOCK, _FAILED = "block.json", "failed"
_POLL_SECONDS = 0.02
Files = Iterator[tuple[str, Iterator[Record]]]
Fill = Callable[[StoreWriter, Files], Mapping[str, Any]]
"""Writes the rows of files into an entry and reports on them."""


@dataclass(frozen=True)
class Block:
    """A block that is there."""

    store: TokenStore | None
    """None: no row of it gave a sample."""
    end: Place
    ends_epoch: bool
    """No row lies behind it."""
    reports: tuple[FileReport, ...]
    rejected: Path
    """Bad rows, one JSON object a line."""


class _Stopped(Exception):
    """The stream is closed."""


class BlockReader:
    """The blocks of one stream in a folder that another process fills."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, number: int, place: Place) -> None:
        """Say which block comes first, and where its rows begin."""

    def open(self, number: int) -> Block:
        """The block, as soon as it is there. DataError: the process that makes it failed."""
        path = self._folder / str(number)
        while not path.is_dir():
            failed = self._folder / _FAILED
            if failed.is_file():
                raise DataError(f"the process of this machine that tokenises the data failed: {failed.read_text()}")
            time.sleep(_POLL_SECONDS)
        return _opened(path)

    def remove(self, before: int) -> None:
        """Give up the blocks before this one, which no rank will open again."""

    def close(self) -> None:
        """Nothing more is opened."""


class BlockMaker(BlockReader):
    """The process that fills the folder. Blocks are opened in order."""

    def __init__(self, folder: Path, cursor: Callable[[Place], Cursor], fill: Fill, bounds: Bounds, mask: bool) -> None:
        super().__init__(folder)
        self._cursor_at, self._fill, self._bounds, self._with_mask = cursor, fill, bounds, mask
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closed = threading.Event()
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        self._oldest = 0

    def begin(self, number: int, place: Place) -> None:
        self._cursor, self._oldest = self._cursor_at(place), number
        self._start(number)

    def open(self, number: int) -> Block:
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise self._error
        if not self._closed.is_set():
            self._start(number + 1)
        return _opened(self._folder / str(number))

    def remove(self, before: int) -> None:
        for number in range(self._oldest, before):
            shutil.rmtree(self._folder / str(number), ignore_errors=True)
        self._oldest = max(self._oldest, before)

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):  # another stream of the run is still there
            self._folder.parent.rmdir()

    def _start(self, number: int) -> None:
        self._thread = threading.Thread(target=self._make, args=(number,), daemon=True)
        self._thread.start()

    def _make(self, number: int) -> None:
        try:
            if self._cursor.at_end:
                self._cursor = self._cursor_at(Place())
            self._build(self._folder / str(number))
        except _Stopped:
            return
        except BaseException as error:
            self._error = error
            text = str(error) if isinstance(error, MswiftError) else f"{type(error).__name__}: {error}"
            with suppress(OSError):
                (self._folder / _FAILED).write_text(text)

    def _build(self, path: Path) -> None:
        with sole_builder(path) as partial:
            writer = StoreWriter(partial, self._with_mask)
            report = self._fill(writer, self._files())
            writer.close(report)
            values = {
                "end": asdict(self._cursor.place),
                "ends_epoch": self._cursor.at_end,
                "is_empty": writer.num_tokens < 2,
                "reports": report["files"],
            }
            (partial / _BLOCK).write_text(json.dumps(values))
            with suppress(OSError):  # of another machine that shares the disk, with the same rows
                partial.rename(path)

    def _files(self) -> Files:
        for name, records in self._cursor.take(self._bounds):
            yield name, self._until_closed(records)

    def _until_closed(self, records: Iterator[Record]) -> Iterator[Record]:
        for record in records:
            if self._closed.is_set():
                raise _Stopped
            yield record


def _opened(path: Path) -> Block:
    values = json.loads((path / _BLOCK).read_text())
    store = None if values["is_empty"] else open_store(path)
    reports = tuple(FileReport.load(report) for report in values["reports"])
    return Block(store, Place(**values["end"]), values["ends_epoch"], reports, path / REJECTED)
