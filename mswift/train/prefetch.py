"""What comes next, prepared by a thread while what is there is in use."""

import threading
from collections.abc import Callable, Generator, Iterable
from typing import Generic, TypeVar

Place = TypeVar("Place")
T = TypeVar("T")

_PATIENCE_SECONDS = 10.0


def ahead(read: Callable[[Place], T], places: Iterable[Place]) -> Generator[T, None, None]:
    """`read` of every place, in order; while one result is in use, a thread reads the next one.

    What `read` raises is raised where its result would have come. To be closed (`contextlib.closing`) by whoever does
    not take all of it: no thread is left then, unless `read` does not return for 10 seconds; that one dies with the
    process, which it does not keep.
    """
    reading: _Reading[T] | None = None
    try:
        for place in places:
            if reading is None:
                reading = _Reading(read, place)
                continue
            result = reading.result()
            reading = _Reading(read, place)
            yield result
        if reading is not None:
            yield reading.result()
    finally:
        if reading is not None:
            reading.join(_PATIENCE_SECONDS)


class _Reading(threading.Thread, Generic[T]):
    """One call under way."""

    def __init__(self, read: Callable[[Place], T], place: Place) -> None:
        super().__init__(name="next batch", daemon=True)
        self._call = lambda: read(place)
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        """Waits for it."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._result
