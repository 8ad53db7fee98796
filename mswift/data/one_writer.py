"""One process of each file system makes something, the others wait and use it."""

from collections.abc import Callable
from pathlib import Path

from mswift.errors import DataError

WRITER_FAILED = "the process of this machine that tokenises the data failed, see its message"
HandOver = Callable[[Path | None], Path | None]
"""Collective: the path that the writer made -> the path for the caller."""


def made_by_writer(
    make: Callable[[], Path],
    locate: Callable[[], Path],
    *,
    is_writer: bool,
    barrier: Callable[[], None],
    hand_over: HandOver | None = None,
) -> Path:
    """The path that `make` returns to the writer; the others wait for it at `barrier`.

    `hand_over`, called by all after the barrier, gives each the path that the writer of its machine made (None: the
    writer failed); without it every other process finds the path by `locate`. An error of the writer is raised there
    and reaches the others as a DataError, after the barrier: nobody is left waiting.
    """
    path: Path | None = None
    if is_writer:
        try:
            path = make()
        finally:
            barrier()
            if hand_over is not None:
                hand_over(path)
    else:
        barrier()
        path = locate() if hand_over is None else hand_over(None)
    if path is None:
        raise DataError(WRITER_FAILED)
    return path
