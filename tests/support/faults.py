"""Faults that befall a rank: set up in its process before the command runs (tests/support/forks.py)."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import torch


def at_step(rank: int, *, of: int, step: int, global_batch_size: int, what: str, until: int | None = None) -> None:
    """On rank `of`, at a step (or steps up to `until`): a signal to itself when it comes to the step; a read of the
    step's data that takes for ever; a batch that is not finite."""
    if rank != of:
        return
    if what.startswith("SIG"):
        _signal_at(range(step, (until or step) + 1), signal.Signals[what])
        return
    from mswift.train import job

    read = job.training_batch

    def training_batch(*arguments: Any) -> Any:
        now = arguments[-1] // global_batch_size + 1
        batch = read(*arguments)
        if step <= now <= (until or step):
            if what == "sleep":
                time.sleep(600)
            for microbatch in batch.microbatches:
                microbatch.loss_weights[0, :4] = torch.inf
        return batch

    job.training_batch = training_batch


def _signal_at(steps: range, number: int) -> None:
    from mswift.train.hang import HangWatch

    at = HangWatch.at

    def told(self: HangWatch, step: int, doing: str) -> None:
        at(self, step, doing)
        if step in steps and doing == "reading data":
            os.kill(os.getpid(), number)

    HangWatch.at = told  # type: ignore[method-assign]


def full_disk(rank: int, *, name: str, limit: int) -> None:
    """From the first file on whose path holds `name`, the kernel refuses to let files of rank 0 grow beyond `limit`."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and name in str(arguments[0]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    if rank == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sys.addaudithook(audit)


def kill_at(rank: int, *, of: int, operation: int, everybody: bool, record: str | None = None) -> None:
    """kill -9 of rank `of` (or of all) right before its file operation number `operation` of a save.

    Operations count from the first byte of the first save; those between a COMMIT and the next first byte do not
    count. record: a file in which the number of operations of rank `of` is noted, in place of a kill.
    """
    if rank == of:
        operations = _Operations(operation, everybody, record)
        operations.install()


class _Operations:
    """Counts the file operations between the first byte of a save and its COMMIT."""

    def __init__(self, fatal: int, everybody: bool, record: str | None) -> None:
        self._fatal, self._everybody, self._record = fatal, everybody, record
        self._count = 0
        self._inside = False

    def install(self) -> None:
        from mswift.converters.io import torch_dist

        torch_dist.open = self._open  # type: ignore[attr-defined]  # before the builtin
        fsync = os.fsync

        def counted_fsync(descriptor: int) -> None:
            self._happens()
            fsync(descriptor)

        os.fsync = counted_fsync
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            self._happens()
            if Path(os.fsdecode(arguments[0])).name.startswith(".checkpoint-"):
                self._inside = False  # this rename is the publication
        elif event in ("os.mkdir", "os.truncate") or (event == "open" and ".partial" in str(arguments[0])):
            self._happens()

    def _happens(self, *, first_byte: bool = False) -> None:
        self._inside = self._inside or first_byte
        if not self._inside:
            return
        self._count += 1
        if self._record is not None:
            with open(self._record, "w") as file:  # its own path is no part of a save
                file.write(str(self._count))
        elif self._count == self._fatal:
            os.killpg(0, signal.SIGKILL) if self._everybody else os.kill(os.getpid(), signal.SIGKILL)

    def _open(self, path: Any, mode: str, buffering: int) -> FileIO:
        return _CountedFile(path, mode, lambda: self._happens(first_byte=True))


class _CountedFile(FileIO):
    """A file whose writes are told to somebody first."""

    def __init__(self, path: Any, mode: str, happens: Callable[[], None]) -> None:
        super().__init__(path, mode)
        self._happens = happens

    def write(self, data: Any) -> int:
        self._happens()
        return super().write(data)
