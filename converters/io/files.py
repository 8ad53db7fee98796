"""Files and directories that appear whole or not at all, and byte copies of bounded size."""

import errno
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mswift.errors import CheckpointError, ConfigError

PIECE_BYTES = 1 << 20
"""Largest single read: larger ones are slower where the page cache is recycled."""

WIDE_BYTES = 16 << 20
"""Block of a tensor that lies transposed in the other format: the runs of its columns grow with the block."""

WRITE_BYTES = 128 << 10
"""Largest single write: for 2 GB on ext4, 1 MiB writes took 4 s of system time, 128 KiB ones 1.0 to 1.2 s."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Unreadable(CheckpointError):
    """The system could not read a file now; what was made of it before is good."""


def open_read(path: Path) -> int:
    """A file descriptor; Unreadable naming the file if it cannot be opened."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read ({error.strerror})") from None


def read_exactly(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fills the view from `offset`, in bounded pieces; CheckpointError if the file ends before."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done : done + PIECE_BYTES]], offset + done)
        except OSError as error:
            raise Unreadable(f"{path}: cannot be read at byte {offset + done} ({error.strerror})") from None
        if count == 0:
            raise CheckpointError(
                f"{path}: ends at byte {offset + done}, {len(view) - done} bytes short; the file is truncated"
            )
        done += count


def read_bytes(fd: int, size: int, offset: int, path: Path) -> bytes:
    """`size` bytes from `offset`."""
    buffer = bytearray(size)
    read_exactly(fd, memoryview(buffer), offset, path)
    return bytes(buffer)


def write_exactly(fd: int, view: memoryview, offset: int) -> None:
    """Writes the whole view at `offset`, in bounded pieces."""
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + WRITE_BYTES], offset + done)


def write_file(path: Path, data: bytes) -> None:
    """A new file with that content, on disk when this returns."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def new_directory(destination: Path, flag: str = "--output_dir") -> Iterator[Path]:
    """A temporary sibling that becomes `destination` when the block ends well, and vanishes when it does not.

    ConfigError (naming `flag`) if the destination exists or another process is writing it; CheckpointError if
    the disk is full. Temporary directories that a killed process left behind are removed.
    """
    destination = Path(os.path.abspath(destination))
    check_absent(destination, flag)
    prefix = f".{destination.name}.mswift-partial-"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag} {destination}: cannot create {destination.parent} ({error.strerror})") from None
    for stale in destination.parent.glob(glob.escape(prefix) + "*"):
        _remove_stale(stale, destination, flag)
    partial = destination.parent / (prefix + uuid.uuid4().hex[:12])
    lock = -1
    try:
        partial.mkdir()
        lock = os.open(partial / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield partial
        os.unlink(partial / ".lock")
        for folder in (*(p for p in partial.rglob("*") if p.is_dir()), partial):
            sync_directory(folder)
        os.rename(partial, destination)
        sync_directory(destination.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise in_words(error, destination, flag) from None
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def check_absent(destination: Path, flag: str) -> None:
    """ConfigError (naming `flag`) if something but an empty directory has that name."""
    try:
        if not os.path.lexists(destination):
            return
        if destination.is_dir() and not destination.is_symlink() and not any(destination.iterdir()):
            return
    except OSError as error:
        raise ConfigError(f"{flag} {destination}: cannot be read ({error.strerror})") from None
    raise ConfigError(f"{flag} {destination} exists already; name a directory that does not exist")


def _remove_stale(partial: Path, destination: Path, flag: str) -> None:
    try:
        lock = os.open(partial / ".lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        shutil.rmtree(partial, ignore_errors=True)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{flag} {destination}: another process is writing it now ({partial.name})") from None
    else:
        shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def in_words(error: OSError, destination: Path, flag: str, state: str = "nothing was published") -> CheckpointError:
    """An error while `destination` was written, in a sentence that says what is there now and what to do."""
    if error.errno in NO_SPACE:
        free = shutil.disk_usage(destination.parent).free
        return CheckpointError(
            f"{flag} {destination}: the disk is full ({error.strerror}; {free:,} bytes free); {state}. "
            "Free some space or name a directory on another disk"
        )
    where = f" ({error.filename})" if error.filename else ""
    return CheckpointError(f"{flag} {destination}: {error.strerror or error}{where}; {state}")
