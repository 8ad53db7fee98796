"""Start a command as several ranks on this machine: a typed job -> argv and environment -> its exit status."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from mswift.errors import ConfigError

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Job:
    """`module` is run as `python -m module arguments...` by every rank."""

    num_processes: int
    module: str
    arguments: tuple[str, ...] = ()

    def argv(self) -> list[str]:
        """The command line of the agent that starts the ranks; it meets its ranks on the loopback interface."""
        torchrun = ["--standalone", f"--nproc_per_node={self.num_processes}", "--module", self.module]
        return [sys.executable, "-m", "mswift.parallel.agent", *torchrun, *self.arguments]

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """`environ`, with this machine's cores shared out among the ranks unless OMP_NUM_THREADS is set."""
        cores = len(os.sched_getaffinity(0))
        return {"OMP_NUM_THREADS": str(max(1, cores // self.num_processes)), **environ}


def mswift_job(num_processes: int, command: str, arguments: list[str]) -> Job:
    """The job that runs `mswift command arguments...` as `num_processes` ranks."""
    if num_processes < 1:
        raise ConfigError(f"--nproc_per_node {num_processes}: at least one process is needed; use --nproc_per_node 1")
    return Job(num_processes, "mswift.cli.main", (command, *arguments))


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
