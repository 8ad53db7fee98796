"""Training commands as real processes without their imports: one process imports everything and forks the ranks.

A fork is a process like any other: it is killed, stopped, signalled and waited for by its pid. A *fault* is a function
of tests/support/faults.py that runs in every rank before the command.
"""

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.ranks import free_port

ROOT = Path(__file__).parents[2]


@dataclass
class Job:
    """Ranks under way."""

    forge: "Forge"
    pids: list[int]
    files: list[Path]

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
        statuses: dict[int, int] = {}
        end, died = time.monotonic() + timeout, False
        while len(statuses) < len(self.pids):
            statuses |= self.forge.ask(("poll", [pid for pid in self.pids if pid not in statuses]))
            if not died and any(status != 0 for status in statuses.values()):
                died, end = True, min(end, time.monotonic() + stragglers)
            if time.monotonic() > end:
                for pid in set(self.pids) - set(statuses):
                    os.kill(pid, signal.SIGKILL)
                end = time.monotonic() + 10
                assert died, f"no end: {[self.output(rank) for rank in range(len(self.pids))]}"
            time.sleep(0.02)
        return [statuses[pid] for pid in self.pids]


class Forge:
    """The process that forks ranks; ended by `close`."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forks", str(theirs.fileno())],
            env=env, cwd=ROOT, pass_fds=[theirs.fileno()],
        )  # fmt: skip
        theirs.close()
        self._folder = tempfile.TemporaryDirectory(prefix="mswift-forks-")

    def ask(self, request: Any) -> Any:
        """One request to the process, and its answer."""
        self._pipe.send_bytes(pickle.dumps(request))
        return pickle.loads(self._pipe.recv_bytes())  # noqa: S301 - our own child

    def start(
        self, argv: Sequence[str], world_size: int = 1, fault: tuple[str, Mapping[str, Any]] | None = None
    ) -> Job:
        """Start `mswift argv` on ranks of their own; argv is what follows the program's name."""
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        files = [folder / f"rank-{rank}.txt" for rank in range(world_size)]
        return Job(self, self.ask(("start", list(argv), files, free_port(), fault)), files)

    def run(
        self,
        argv: Sequence[str],
        world_size: int = 1,
        status: int = 0,
        fault: tuple[str, Mapping[str, Any]] | None = None,
    ) -> str:
        """Run to the end, with this status on every rank; the output of all ranks."""
        job = self.start(argv, world_size, fault)
        statuses = job.wait()
        output = "".join(job.output(rank) for rank in range(world_size))
        assert statuses == [status] * world_size, (statuses, output)
        return output

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.wait(20)
        self._folder.cleanup()


# -- in the process that forks


def _serve(pipe: Connection) -> None:
    while True:
        try:
            kind, *rest = pickle.loads(pipe.recv_bytes())  # noqa: S301 - our own parent
        except EOFError:
            return
        answer = _start(pipe, *rest) if kind == "start" else _poll(*rest)
        pipe.send_bytes(pickle.dumps(answer))


def _start(pipe: Connection, argv: list[str], files: list[Path], port: int, fault: Any) -> list[int]:
    pids: list[int] = []
    for rank, file in enumerate(files):
        pid = os.fork()
        if pid == 0:
            pipe.close()
            os.setpgid(0, pids[0] if pids else 0)
            _rank(argv, rank, len(files), port, file, fault)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return pids


def _poll(pids: list[int]) -> dict[int, int]:
    """Statuses of those that have ended."""
    ended = {}
    for pid in pids:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


def _rank(argv: list[str], rank: int, world_size: int, port: int, file: Path, fault: Any) -> None:
    """Be one rank; does not return."""
    out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    if world_size > 1:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
    status = 1
    try:
        from mswift.cli.main import console
        from tests.support import faults

        if fault is not None:
            getattr(faults, fault[0])(rank, **fault[1])
        sys.argv = ["mswift", *argv]
        console()
    except SystemExit as ending:
        status = int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _import_everything() -> None:
    """What a command imports, once."""
    from mswift.parallel import device

    device.prepare("cpu")
    for name in ("matplotlib.figure", "transformers.models.auto.tokenization_auto", "mswift.cli.options",
                 "mswift.train.job", "mswift.train.export", "tests.support.faults"):  # fmt: skip
        importlib.import_module(name)


if __name__ == "__main__":
    _import_everything()
    _serve(Connection(int(sys.argv[1])))
