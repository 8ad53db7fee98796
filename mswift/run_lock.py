"""One run at a time in a run directory: a lock that the system gives back however the process ends, and who has it."""

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mswift.errors import ConfigError
from mswift.rundir import LOCK

_PATIENCE_SECONDS = 1.0
"""For which a start waits for a lock: `mswift status` holds it for a moment when it looks whether somebody does."""

_LEASE = "the file server gives its lock back when its lease ends, about 90 s later"


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Make the run directory and keep other runs out of it while inside; ConfigError when one is there already.

    flock: the kernel gives it back at kill -9 too, a network file system's server after its lease. The file says who
    has it. A file system without locks lets everybody in, with a warning.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            _take(descriptor)
        except BlockingIOError:
            raise ConfigError(_refusal(output_dir, os.pread(descriptor, 4096, 0))) from None
        except OSError as error:
            print(
                f"warning: --output_dir {output_dir}: its file system has no locks ({error.strerror}), so that nothing "
                "keeps a second run out of it: start one at a time",
                file=sys.stderr,
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_holder()).encode() + b"\n", 0)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> None:
    """BlockingIOError where somebody has the lock and keeps it."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _holder() -> dict[str, object]:
    """This process, for those who find the directory locked."""
    holder: dict[str, object] = {"host": platform.node(), "pid": os.getpid()}
    holder["since"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
    if "SLURM_JOB_ID" in os.environ:
        holder["slurm_job"] = os.environ["SLURM_JOB_ID"]
    return holder


def _refusal(output_dir: Path, content: bytes) -> str:
    """Why a second run may not write there, with what the lock file says of the first."""
    text = f"--output_dir {output_dir}: another run is writing there now"
    elsewhere = ""
    try:
        holder = json.loads(content)
        job = f", SLURM job {holder['slurm_job']}" if "slurm_job" in holder else ""
        text += f" (pid {holder['pid']} on {holder['host']}{job}, since {holder['since']})"
        if holder["host"] != platform.node():
            elsewhere = f". If that process is gone: {_LEASE}"
    except (ValueError, TypeError, KeyError):
        pass  # it has just begun, or is of an older version
    return f"{text}; wait for its end, or use another --output_dir{elsewhere}"
