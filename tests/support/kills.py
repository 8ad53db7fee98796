"""Builds of the token cache in a child that is killed at the n-th write, sync, rename or removal."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mswift.data import cache

EVENTS: list[tuple[Any, str]] = [
    (cache._HashedFile, "write"),
    (os, "fsync"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "unlink"),
]
"""Before (and, of a write, in the middle of) each of these a build is killed."""


def content(directory: Path) -> dict[str, bytes]:
    """Files of a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def in_child(work: Callable[[], object]) -> int:
    """Status of a fork that does it: 0, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def counting(die_at: int | None) -> list[int]:
    """Count events in this process; SIGKILL at the one with the number `die_at`."""
    seen = [0]

    def counted(owner: Any, name: str, original: Any) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            if seen[0] == die_at:
                if name == "write":
                    original(args[0], args[1][: len(args[1]) // 2])
                    args[0]._stream.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, call)

    for owner, name in EVENTS:
        counted(owner, name, getattr(owner, name))
    return seen
