"""Run a job's part on this machine to its end: its ranks, their signals, its exit status."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mswift.launchers.job import Job

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def run(job: Job) -> int:
    """Run `job` to its end; returns its exit status (128 + n when signal n ended it).

    SIGINT, SIGTERM and SIGUSR1 that reach this process go to the ranks, which end the job in their own way.
    """
    # A signal of the first second waits, in us until it can be forwarded, in the agent until it can hand it on.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    # A session of its own: Ctrl-C reaches the ranks once, through us, not a second time from the terminal.
    process = subprocess.Popen(job.argv(), env=job.environment(os.environ), start_new_session=True)
    with process, _forwarding(process):
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = process.wait()
    return status if status >= 0 else 128 - status


@contextmanager
def _forwarding(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """While inside, our signals are the child's."""

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
