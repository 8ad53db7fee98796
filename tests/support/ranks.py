"""Run a function on every rank of a small job: one set of processes per world size, kept for all tests of a session.

A function is named by its file (`"tests/cpu/test_x.py:work"`) or given as a module-level callable; it is called as
`function(payload)` on every rank and returns something that pickles. torch.distributed is not started for it:
`join(dims)` inside the function does that, once per process. What else a function opens it must close: a rank on
which process groups, threads or changed settings are left is an error. Ranks are forks of tests/support/server.py.
"""

import atexit
import inspect
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.support.server import ENVIRON, ROOT, STACKS, Fork, load, servers

_pools: dict[int, "RankPool"] = {}
_TAIL_CHARACTERS = 4000


class RankError(Exception):
    """A rank failed, left something open or did not answer in time; the text holds tracebacks, output, stacks."""


def run_ranks(
    world_size: int, target: str | Callable[[Any], Any], payload: Any = None, timeout: float = 180.0
) -> list[Any]:
    """Results of target(payload), by rank. Raises RankError; the processes are then ended and started anew later."""
    pool = _pools.get(world_size)
    if pool is None:
        pool = _pools[world_size] = RankPool(world_size)
    try:
        return pool.run(target, payload, timeout)
    except RankError:
        _pools.pop(world_size).close()
        raise


@dataclass
class _Rank:
    """One process: what it prints is in `output`, of which `read` characters belong to earlier calls."""

    fork: Fork
    pipe: Connection
    output: Path
    read: int = 0
    silent: bool = False

    def tail(self) -> str:
        """The end of what it has printed in this call, without the names of compiled modules, which a crash adds."""
        said = self.output.read_text(errors="replace")[self.read :]
        return re.sub(r"^Extension modules: .*$", "", said, flags=re.MULTILINE)[-_TAIL_CHARACTERS:]


class RankPool:
    """Processes with RANK, WORLD_SIZE and so on in their environment, waiting for functions to call."""

    def __init__(self, world_size: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mswift-ranks-")
        port = free_port()
        self._ranks: list[_Rank] = []
        for rank in range(world_size):
            ours, theirs = Pipe()
            output = Path(self._folder.name) / f"rank-{rank}.txt"
            environ = ENVIRON | rank_variables(rank, world_size, port)
            server = servers()[rank % len(servers())]
            fork = server.fork("tests/support/ranks.py:work", (), output, environ, pipe=theirs)
            theirs.close()
            self._ranks.append(_Rank(fork, ours, output))

    @property
    def pids(self) -> list[int]:
        """Of the processes, by rank."""
        return [rank.fork.pid for rank in self._ranks]

    def run(self, target: str | Callable[[Any], Any], payload: Any, timeout: float) -> list[Any]:
        """Call the function on all ranks and wait for the answers."""
        request = pickle.dumps((target if isinstance(target, str) else _name(target), payload))
        for rank in self._ranks:
            rank.read = len(rank.output.read_text(errors="replace"))
            rank.pipe.send_bytes(request)
        deadline = time.monotonic() + timeout
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < len(self._ranks):
            waiting = {rank.pipe: number for number, rank in enumerate(self._ranks) if number not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                number = waiting[pipe]  # type: ignore[index]
                answers[number] = self._answer(self._ranks[number])
                if not answers[number][0]:
                    deadline = min(deadline, time.monotonic() + 3)  # the others may wait for it for ever
            if not ready:
                answers |= self._silent(list(waiting.values()))
        failures = [f"rank {number}:\n{text}" for number, (ok, text) in sorted(answers.items()) if not ok]
        if failures:
            raise RankError("\n".join(failures))
        return [answers[number][1] for number in range(len(self._ranks))]

    def _answer(self, rank: _Rank) -> tuple[bool, Any]:
        try:
            return pickle.loads(rank.pipe.recv_bytes())  # type: ignore[no-any-return]  # noqa: S301 - our own child
        except (EOFError, ConnectionResetError):
            return False, f"the process ended with status {rank.fork.wait(10)}\n{rank.tail()}"

    def _silent(self, numbers: list[int]) -> dict[int, tuple[bool, str]]:
        """Answers for ranks that gave none in time: where their threads are."""
        for number in numbers:
            self._ranks[number].silent = True
            os.kill(self._ranks[number].fork.pid, STACKS)
        time.sleep(0.5)
        return {number: (False, f"no answer in time\n{self._ranks[number].tail()}") for number in numbers}

    def close(self) -> None:
        """End the processes: a rank that is idle leaves by itself; one that is not, and all children, are killed."""
        for rank in self._ranks:
            rank.pipe.close()
        for rank in self._ranks:
            if rank.fork.server.alive:
                rank.fork.wait(0 if rank.silent else 3)
                _kill_group(rank.fork.pid)
                rank.fork.wait(10)
        self._folder.cleanup()
        self._ranks = []


def rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment by which a process knows its place in a job on this machine."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}


def join(world_size: int, **degrees: Any) -> tuple[Any, Any]:
    """Inside a function: prepare megatron-core for the CPU and join the job; (ParallelDims, torch.device)."""
    from mswift.launchers.environment import RankInfo, current
    from mswift.parallel import device, groups
    from mswift.topology import ParallelDims

    chosen = device.prepare("cpu")
    dims = ParallelDims(world_size=world_size, **degrees)
    groups.init(dims, chosen, current() or RankInfo.single(), timeout_seconds=120)
    return dims, chosen


def leaving_groups(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of ranks that leaves megatron-core's groups, which it entered, at its end."""

    @wraps(function)
    def call(payload: Any) -> Any:
        result = function(payload)
        from mswift.parallel.megatron import world

        world.leave()
        return result

    return call


def free_port() -> int:
    """A port that nobody has now, below those that the system gives out: it is bound seconds later."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _name(function: Callable[..., Any]) -> str:
    file = Path(inspect.getsourcefile(inspect.unwrap(function)) or "").resolve().relative_to(ROOT)
    return f"{file}:{function.__qualname__}"


def _kill_group(pid: int) -> None:
    """kill -9 of a rank and of what it started (megatron-core's own save leaves a manager process)."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@atexit.register
def _close_pools() -> None:
    for pool in _pools.values():
        pool.close()


# -- in a rank


def work(pipe: Connection) -> None:
    """Answer calls until the other end closes."""
    while True:
        try:
            name, payload = pickle.loads(pipe.recv_bytes())  # noqa: S301 - our own parent
        except EOFError:
            for child in multiprocessing.active_children():
                child.terminate()
            os._exit(0)  # gloo's threads would keep a rank alive whose peers are gone
        before = _settings()
        try:
            result = load(name)(payload)
            left = left_open() + _changed(before)
            if left:
                raise RuntimeError(f"{name} returned and left behind: {'; '.join(left)}")
            answer = pickle.dumps((True, result))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)


def left_open() -> list[str]:
    """Process groups beside the job's own, Python's threads and child processes that a function has not closed."""
    from torch.distributed import distributed_c10d as c10d

    groups = [name for group, name in c10d._world.pg_names.items() if group is not c10d.GroupMember.WORLD]
    others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    children = [child.name for child in multiprocessing.active_children()]
    children = [name for name in children if not name.startswith("SyncManager")]  # megatron-core's save keeps one
    found = {"process group": groups, "thread": others, "process": children}
    return [f"{kind} {name}" for kind, names in found.items() for name in names]


def _settings() -> dict[str, Any]:
    """What a function could leave changed for the next one."""
    import torch

    of_libraries = ("NVTE_", "PYTORCH_NVML_")  # set by megatron-core, and by the import of deepspeed
    variables = {name: value for name, value in os.environ.items() if not name.startswith(of_libraries)}
    variables = {f"environment variable {name}": value for name, value in variables.items()}
    return variables | {
        "directory": os.getcwd(),
        "default dtype": torch.get_default_dtype(),
        "gradients enabled": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch threads": torch.get_num_threads(),
    }


def _changed(before: dict[str, Any]) -> list[str]:
    now = _settings()
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return [f"{name}: {before.get(name)!r} is now {now.get(name)!r}" for name in names]
