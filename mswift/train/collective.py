"""Agreement between ranks for the loop and the checkpoints: an error on one rank is an error on all, with its text."""

import itertools
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mswift.converters.io.files import NO_SPACE
from mswift.errors import CheckpointError, MswiftError
from mswift.topology import ParallelDims

T = TypeVar("T")


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, in rank order, on every rank (JSON-sized things only)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_on_first(value: Any) -> list[Any]:
    """The value of every rank, in rank order, on rank 0; [] on the others. For what grows with the job."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def barrier() -> None:
    """All ranks meet here."""
    gather_objects(None)


def largest(values: Sequence[int], device: torch.device) -> list[int]:
    """The largest value of all ranks at each place, on every rank; one small collective, for every step."""
    tensor = torch.tensor([int(value) for value in values], dtype=torch.int32, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [int(value) for value in tensor.tolist()]


@contextmanager
def lost_ranks_in_words() -> Iterator[None]:
    """A collective that fails because another rank has gone is a MswiftError; that rank's own message is the cause."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and "gloo" not in text:
            raise
        raise MswiftError(
            "a collective failed: another rank has ended, or cannot be reached; look for its message, which comes "
            f"first. The same command continues from the newest checkpoint. ({text.splitlines()[0][:200]})"
        ) from error


_meetings = itertools.count()


def patient_barrier() -> None:
    """All ranks meet here, however long one of them works before (tokenising): nothing is under way that times out."""
    number = next(_meetings)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store, name = dist.distributed_c10d._get_default_store(), f"mswift/meeting/{number}"
    store.add(name, 1)
    while store.add(name, 0) < dist.get_world_size():
        time.sleep(0.05)


def from_writer(value: T | None, is_writer: bool) -> T | None:
    """On every rank: the value of the writer of its machine (by host name); None where a writer there has none."""
    host = socket.gethostname()
    found = [other for name, writes, other in gather_objects((host, is_writer, value)) if name == host and writes]
    return None if None in found else found[0]


@contextmanager
def ended_by(end: Callable[[], None], dims: ParallelDims) -> Iterator[None]:
    """Call `end`, which gives process groups back, when the block ends.

    After an error only in a job of one rank: NCCL would wait for ranks that are elsewhere, and the process ends anyway.
    """
    try:
        yield
    except BaseException:
        if dims.world_size == 1:
            end()
        raise
    end()


@contextmanager
def agreed(what: str) -> Iterator[None]:
    """Run a block without collectives on every rank and leave it together: if any rank failed, all raise.

    A rank raises its own error (an OSError in words), the others a CheckpointError that names the first rank that
    failed. Without this a rank that fails alone (a full disk, a damaged shard) leaves the others waiting for it.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    texts = gather_objects(None if failure is None else _describe(failure))
    if failure is not None and (isinstance(failure, BrokenPipeError) or not isinstance(failure, OSError)):
        raise failure
    failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
    if failed:
        rank, text = failed[0]
        raise CheckpointError(f"{what} failed on rank {rank}: {text}") from failure


def _describe(error: BaseException) -> str:
    """One line: the message of a user error, or the type and text of any other."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return (
            f"the disk is full ({error.strerror}); nothing was published. Free some space and give the same command "
            "again: it continues from the newest checkpoint"
        )
    return str(error) if isinstance(error, MswiftError) else f"{type(error).__name__}: {error}"
