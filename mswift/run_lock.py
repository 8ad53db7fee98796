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
from mswift.rundir import JOBS, LAUNCH, LOCK

_PATIENCE_SECONDS = 1.0
"""For which a start waits for a lock: `mswift status` holds it for a moment when it looks whether somebody does."""
_POLL_SECONDS = 0.02

_LEASE = "the file server gives its lock back when its lease ends, about 90 s later"


@contextmanager
def locked(output_dir: Path, own_past_seconds: float = 0.0) -> Iterator[None]:
    """Make the run directory and keep other runs out of it while inside; ConfigError when one is there already.

    own_past_seconds: for which an earlier start of this SLURM job is waited for. SLURM starts a job again on other
    nodes when it cannot reach one, where the ranks may work on until they see that the others have gone.
    flock: the kernel gives it back at kill -9 too, a network file system's server after its lease. The file says who
    has it. A file system without locks lets everybody in, with a warning.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            _take(descriptor, output_dir, own_past_seconds)
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


def _take(descriptor: int, output_dir: Path, own_past_seconds: float) -> None:
    """BlockingIOError where somebody has the lock and keeps it."""
    began, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.monotonic() - began
            content = os.pread(descriptor, 4096, 0)
            own_past = _is_own_past(output_dir, content)
            if waited > (own_past_seconds if own_past else _PATIENCE_SECONDS):
                raise
            if own_past and not said:
                print(f"waiting for an earlier start of this job to end: {holder_in_words(content)}", flush=True)
                said = True
            time.sleep(_POLL_SECONDS)


def _is_own_past(output_dir: Path, content: bytes) -> bool:
    """Whether the lock is that of an earlier start of this SLURM job, or of another one of its chain."""
    try:
        other = json.loads(content)
        if other["slurm_job"] == os.environ.get("SLURM_JOB_ID"):
            return int(other["slurm_restart"]) < int(_restart())
        jobs = json.loads((output_dir / LAUNCH / JOBS).read_text())["jobs"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return {other["slurm_job"], os.environ.get("SLURM_JOB_ID")} <= set(jobs)


def _restart() -> str:
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def _holder() -> dict[str, object]:
    """This process, for those who find the directory locked."""
    holder: dict[str, object] = {"host": platform.node(), "pid": os.getpid()}
    holder["since"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
    if "SLURM_JOB_ID" in os.environ:
        holder |= {"slurm_job": os.environ["SLURM_JOB_ID"], "slurm_restart": _restart()}
    return holder


def holder_in_words(content: bytes) -> str | None:
    """Who has a lock, from what its file holds; None where it does not say (the holder has just begun)."""
    try:
        holder = json.loads(content)
        job = f", SLURM job {holder['slurm_job']}" if "slurm_job" in holder else ""
        return f"pid {holder['pid']} on {holder['host']}{job}, since {holder['since']}"
    except (ValueError, TypeError, KeyError):
        return None


def _refusal(output_dir: Path, content: bytes) -> str:
    """Why a second run may not write there, with what the lock file says of the first."""
    text = f"--output_dir {output_dir}: another run is writing there now"
    elsewhere = ""
    if (holder := holder_in_words(content)) is not None:
        text += f" ({holder})"
        if json.loads(content)["host"] != platform.node():
            elsewhere = f". If that process is gone: {_LEASE}"
    return f"{text}; wait for its end, or use another --output_dir{elsewhere}"
