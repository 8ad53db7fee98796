"""Agreement between ranks for the loop and the checkpoints: an error on one rank is an error on all, with its text."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from mswift.errors import CheckpointError, MswiftError


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, in rank order, on every rank (JSON-sized things only)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """All ranks meet here."""
    gather_objects(None)


@contextmanager
def agreed(what: str) -> Iterator[None]:
    """Run a block on every rank and leave it together: if any rank failed, all raise, naming the first that did.

    Without this a rank that fails alone (a full disk, a damaged shard) leaves the others waiting for it.
    """
    failure: BaseException | None = None
    try:
        yield
    except (MswiftError, OSError) as error:
        failure = error
    texts = gather_objects(None if failure is None else _describe(failure))
    if failure is not None and isinstance(failure, MswiftError):
        raise failure
    failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
    if failed:
        rank, text = failed[0]
        raise CheckpointError(f"{what} failed on rank {rank}: {text}") from failure


def _describe(error: BaseException) -> str:
    """One line: the message of a user error, or the type and text of an operating-system error."""
    return str(error) if isinstance(error, MswiftError) else f"{type(error).__name__}: {error}"
