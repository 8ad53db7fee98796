"""An entry of the token cache while it is built: by one process at a time, and on from a checkpoint after a crash.

The folder .KEY.partial lies beside the entry KEY, the lock .KEY.lock (flock: the kernel gives it back at kill -9) too.
journal.json in the folder says how many bytes of each file are durable and what the writer knew then; it is replaced
as a whole after the files are synced. What lies beyond those bytes is cut off when the build goes on.
"""

import fcntl
import json
import logging
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mswift.data.hashing import content_hash
from mswift.errors import ConfigError, DataError

JOURNAL = "journal.json"
_log = logging.getLogger(__name__)


@contextmanager
def sole_builder(directory: Path) -> Iterator[Path]:
    """The folder to build the entry `directory` in, while no other process does; waits for one that does.

    Removed at the end, but for a build that was stopped from outside and has a checkpoint. ConfigError where it cannot
    be written.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.parent / f".{directory.name}.lock", directory) as is_sole:
            # Without locks nobody knows whose a folder is, so none is continued.
            partial = directory.parent / f".{directory.name}.{'partial' if is_sole else uuid.uuid4().hex}"
            partial.mkdir(exist_ok=True)
            keep = False
            try:
                yield partial
            except (DataError, ConfigError):
                raise  # the data or the options are at fault: the next build is another one
            except BaseException:
                keep = is_sole and (partial / JOURNAL).is_file()
                raise
            finally:
                if not keep:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        existing = next(parent for parent in directory.absolute().parents if parent.is_dir())
        free = shutil.disk_usage(existing).free
        raise ConfigError(
            f"the token cache cannot be written to {directory.parent} ({error.strerror or error}; {free:,} bytes "
            "free): name a folder with room for it, --cache_dir /path"
        ) from error


@contextmanager
def _locked(path: Path, directory: Path) -> Iterator[bool]:
    """Hold the lock; False where the file system has none."""
    descriptor, is_sole = _lock(path, directory)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {platform.node()}".encode(), 0)
        yield is_sole
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _lock(path: Path, directory: Path) -> tuple[int, bool]:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
                _log.warning("%s builds the token cache entry %s: waiting for it", holder, directory)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            _log.warning(
                "the file system of %s has no locks (%s): two processes may build the same entry, and an "
                "interrupted build begins anew", directory, error.strerror,
            )  # fmt: skip
            return descriptor, False
        except BaseException:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor, True
        os.close(descriptor)  # its last holder removed it


def write_journal(partial: Path, values: Mapping[str, Any]) -> None:
    """Replace the journal, durably."""
    temporary = partial / f".{JOURNAL}"
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump({"journal": values, "sha256": content_hash(values)}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(partial / JOURNAL)


def read_journal(partial: Path) -> dict[str, Any] | None:
    """What the build goes on from; None where there is no journal that fits the files beside it."""
    try:
        envelope = json.loads((partial / JOURNAL).read_text(encoding="utf-8"))
        values: dict[str, Any] = envelope["journal"]
        if content_hash(values) != envelope["sha256"]:
            return None
        whole = all((partial / name).stat().st_size >= size for name, size in values["sizes"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return values if whole else None
