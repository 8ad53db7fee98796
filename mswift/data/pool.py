"""Batches encoded by several processes, results in order.

Workers are programs of their own (`python -m mswift.data.worker`), never forks: this process may hold a GPU and
threads. Each has one end of a socket pair, over which pickles travel between the two and nobody else. It holds one
batch at a time, and no more than four batches a worker are read ahead of the result that is waited for. A worker ends
when its socket does, whatever became of this process.
"""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import TypeVar

from mswift.data.encoding import Batch, Encoded, Encoder
from mswift.errors import MswiftError

_AHEAD = 4
_PATIENCE_SECONDS = 5.0
_SMALL_BYTES = 16 << 20
_MOST_PROCESSES = 8

Step = TypeVar("Step")


def default_num_proc(files: Sequence[Path]) -> int:
    """One process a processor, up to 8; one where starting more takes longer than the work."""
    if sum(path.stat().st_size for path in files) < _SMALL_BYTES:
        return 1
    return min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)


class WorkerLost(MswiftError):
    """A tokenising process ended by itself."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    link: Connection
    task: "_Waiting | None" = None


@dataclass
class _Waiting:
    """A step whose turn has not come; `encoded` is missing while a worker has it."""

    step: object
    done: bool
    encoded: Encoded | None = None


def in_order(steps: Iterator[Step], encoder: Encoder, num_proc: int) -> Iterator[tuple[Step, Encoded | None]]:
    """Every step in order; those that are a Batch with their result.

    Raises what `encoder` raises, at the batch in question, and WorkerLost.
    """
    if num_proc == 1:
        for step in steps:
            yield step, encoder(step) if isinstance(step, Batch) else None
        return
    with _workers(encoder, num_proc) as workers:
        waiting: deque[_Waiting] = deque()
        more = True
        while more or waiting:
            while more and len(waiting) < _AHEAD * num_proc and (free := _free(workers)) is not None:
                following = next(steps, None)
                if following is None:
                    more = False
                    break
                waiting.append(entry := _Waiting(following, not isinstance(following, Batch)))
                if not entry.done:
                    _send(free, entry)
            while waiting and waiting[0].done:
                entry = waiting.popleft()
                yield entry.step, entry.encoded  # type: ignore[misc]
            busy = [worker.link for worker in workers if worker.task is not None]
            if waiting and busy:
                for link in wait(busy):
                    _receive(next(worker for worker in workers if worker.link is link))


def _free(workers: list[_Worker]) -> _Worker | None:
    return next((worker for worker in workers if worker.task is None), None)


def _send(worker: _Worker, entry: _Waiting) -> None:
    try:
        worker.link.send(entry.step)
    except (BrokenPipeError, ConnectionResetError):
        raise _lost(worker) from None
    worker.task = entry


def _receive(worker: _Worker) -> None:
    try:
        result = worker.link.recv()
    except (EOFError, ConnectionResetError):
        raise _lost(worker) from None
    if isinstance(result, BaseException):
        raise result
    assert worker.task is not None
    worker.task.encoded, worker.task.done, worker.task = result, True, None


def _lost(worker: _Worker) -> WorkerLost:
    try:
        status: object = worker.process.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        status = "none yet"
    return WorkerLost(
        f"a tokenising process (pid {worker.process.pid}) ended with status {status} before it was done; its message, "
        "if it had one, is above. Status -9 is mostly a lack of memory: --dataset_num_proc 1 needs least. The same "
        "command continues"
    )


@contextmanager
def _workers(encoder: Encoder, num_proc: int) -> Iterator[list[_Worker]]:
    """The processes, each with its encoder; they have ended when the block has."""
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker()) for _ in range(num_proc)]
        for worker in workers:
            _send(worker, _Waiting(encoder, done=False))
            worker.task = None
        yield workers


@contextmanager
def _worker() -> Iterator[_Worker]:
    mine, other = Pipe()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with other:
        process = subprocess.Popen(
            [sys.executable, "-m", "mswift.data.worker", str(other.fileno())],
            pass_fds=[other.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process alone; its end closes the socket
        )
    try:
        with mine:
            yield _Worker(process, mine)
    finally:
        process.kill()
        process.wait()
