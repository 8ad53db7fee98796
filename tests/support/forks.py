"""Training commands as real processes without their imports: the ranks are forks of tests/support/server.py.

A fork is a process like any other: it is killed, stopped, signalled and waited for by its pid. A *fault* is a function
of tests/support/faults.py that runs in every rank before the command.
"""

import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.ranks import free_port, rank_variables
from tests.support.server import ENVIRON, Fork, load, servers

Fault = tuple[str, Mapping[str, Any]]
_starts = itertools.count()


@dataclass
class Job:
    """Ranks under way."""

    forks: list[Fork]
    files: list[Path]

    @property
    def pids(self) -> list[int]:
        """By rank."""
        return [fork.pid for fork in self.forks]

    def output(self, rank: int) -> str:
        """What a rank has printed so far."""
        return self.files[rank].read_text(errors="replace")

    def kill(self, ranks: Sequence[int]) -> None:
        """kill -9 of ranks that have not been waited for."""
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGKILL)

    def wait(self, timeout: float = 120.0, stragglers: float = 25.0) -> list[int]:
        """Exit statuses by rank (-n: ended by signal n). As a launcher does, ends the others some time after a death.

        AssertionError if they do not end within `timeout`.
        """
        end, died = time.monotonic() + timeout, False
        while None in (statuses := [fork.poll() for fork in self.forks]):
            if not died and any(status is not None and status != 0 for status in statuses):
                died, end = True, min(end, time.monotonic() + stragglers)
            if time.monotonic() > end:
                self.kill([rank for rank, status in enumerate(statuses) if status is None])
                end = time.monotonic() + 10
                assert died, f"no end: {[self.output(rank) for rank in range(len(self.forks))]}"
            time.sleep(0.02)
        return [status for status in statuses if status is not None]


class Forge:
    """Starts commands and keeps what they print until `close`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mswift-forks-")

    def start(
        self,
        argv: Sequence[str],
        world_size: int = 1,
        fault: Fault | None = None,
        environ: Mapping[str, str] = ENVIRON,
    ) -> Job:
        """Start `mswift argv` on ranks of their own, in one process group; argv is what follows the program's name."""
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        job = Job([], [folder / f"rank-{rank}.txt" for rank in range(world_size)])
        port, first = free_port(), next(_starts)  # a run and the one that continues it have other servers, too
        for rank, file in enumerate(job.files):
            place = rank_variables(rank, world_size, port) if world_size > 1 else {}
            group = job.pids[0] if job.pids else 0
            server = servers()[(first + rank) % len(servers())]
            call = ("tests/support/forks.py:be_command", (list(argv), rank, fault))
            job.forks.append(server.fork(*call, file, {**environ, **place}, group))
        return job

    def run(
        self,
        argv: Sequence[str],
        world_size: int = 1,
        status: int = 0,
        fault: Fault | None = None,
        environ: Mapping[str, str] = ENVIRON,
    ) -> str:
        """Run to the end, with this status on every rank; the output of all ranks."""
        job = self.start(argv, world_size, fault, environ)
        statuses = job.wait()
        output = "".join(job.output(rank) for rank in range(world_size))
        assert statuses == [status] * world_size, (statuses, output)
        return output

    def close(self) -> None:
        """Forget what was printed."""
        self._folder.cleanup()


def be_command(argv: list[str], rank: int, fault: Fault | None) -> None:
    """In a fork: the command, after its fault."""
    from mswift.cli.main import console

    if fault is not None:
        load(f"tests/support/faults.py:{fault[0]}")(rank, **fault[1])
    sys.argv = ["mswift", *argv]
    console()
