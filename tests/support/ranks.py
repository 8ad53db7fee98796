"""Run a function on every rank of a small job: one set of processes per world size, kept for all tests of a session.

A function is named by its file (`"tests/cpu/test_x.py:work"`) or given as a module-level callable; it is called as
`function(payload)` on every rank and returns something that pickles. torch.distributed is not started for it:
`join(dims)` inside the function does that, once per process.
"""

import atexit
import importlib
import inspect
import multiprocessing
import os
import pickle
import random
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_pools: dict[int, "RankPool"] = {}


class RankError(Exception):
    """A rank failed or did not answer in time; the text holds the tracebacks."""


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


class RankPool:
    """Processes with RANK, WORLD_SIZE and so on in their environment, waiting for functions to call."""

    def __init__(self, world_size: int) -> None:
        port = free_port()
        self._workers: list[tuple[subprocess.Popen[bytes], Connection]] = []
        for rank in range(world_size):
            ours, theirs = Pipe()
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
            env = {**os.environ, **{name: str(value) for name, value in variables.items()}}
            env |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.ranks", str(theirs.fileno())],
                env=env,
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
            )
            theirs.close()
            self._workers.append((process, ours))

    def run(self, target: str | Callable[[Any], Any], payload: Any, timeout: float) -> list[Any]:
        """Call the function on all ranks and wait for the answers."""
        name = target if isinstance(target, str) else _name(target)
        for _, pipe in self._workers:
            pipe.send_bytes(pickle.dumps((name, payload)))
        deadline = time.monotonic() + timeout
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < len(self._workers):
            waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers) if rank not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                answers[rank] = self._answer(rank)
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + 3)  # the others may wait for it for ever
            if not ready:
                answers |= dict.fromkeys(waiting.values(), (False, "no answer in time"))
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in sorted(answers.items()) if not ok]
        if failures:
            raise RankError("\n".join(failures))
        return [answers[rank][1] for rank in range(len(self._workers))]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        process, pipe = self._workers[rank]
        try:
            return pickle.loads(pipe.recv_bytes())  # type: ignore[no-any-return]  # noqa: S301 - our own child
        except EOFError:
            return False, f"the process ended with status {process.wait()}"

    def close(self) -> None:
        """End the processes: a rank that is idle leaves by itself (and ends its own children), another is killed."""
        for _, pipe in self._workers:
            pipe.close()
        deadline = time.monotonic() + 3
        for process, _ in self._workers:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def join(world_size: int, **degrees: Any) -> tuple[Any, Any]:
    """Inside a function: prepare megatron-core for the CPU and join the job; (ParallelDims, torch.device)."""
    from mswift.launchers.environment import RankInfo, current
    from mswift.parallel import device, groups
    from mswift.topology import ParallelDims

    chosen = device.prepare("cpu")
    dims = ParallelDims(world_size=world_size, **degrees)
    groups.init(dims, chosen, current() or RankInfo.single(), timeout_seconds=120)
    return dims, chosen


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
    file = Path(inspect.getsourcefile(function) or "").resolve().relative_to(ROOT)
    return f"{file}:{function.__qualname__}"


def load(name: str) -> Callable[..., Any]:
    """The function of "file:function"."""
    file, _, function = name.partition(":")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    return getattr(module, function)  # type: ignore[no-any-return]


def _work(pipe: Connection) -> None:
    """Answer calls until the other end closes."""
    while True:
        try:
            name, payload = pickle.loads(pipe.recv_bytes())  # noqa: S301 - our own parent
        except EOFError:
            return
        try:
            answer = (True, load(name)(payload))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


@atexit.register
def _close_pools() -> None:
    for pool in _pools.values():
        pool.close()


if __name__ == "__main__":
    _work(Connection(int(sys.argv[1])))
    for child in multiprocessing.active_children():  # megatron-core's own save leaves a manager process
        child.terminate()
    os._exit(0)  # gloo's threads would keep a rank alive whose peers are gone
