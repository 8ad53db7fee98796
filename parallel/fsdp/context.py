"""The process groups of ranks that share sequences, and the attention that is told of them."""

from collections.abc import Iterator
from types import SimpleNamespace

import torch.distributed as dist

from mswift.parallel import sequence
from mswift.topology import ParallelDims

Members = list[tuple[int, ...]]


def share_sequences(
    dims: ParallelDims, rank: int, kind: str
) -> tuple[dist.ProcessGroup | None, list[dist.ProcessGroup]]:
    """(this rank's context-parallel group, None where it has sequences alone; groups made, which the caller destroys).

    kind: a `cp_comm_type`. To be called by all ranks of the job.
    """
    if dims.cp == 1:
        sequence.share_with(kind, None, 1)
        return None, []
    context = _mine(sorted({dims.members("cp", each) for each in range(dims.world_size)}), rank)
    levels = [_mine(every, rank) for every in _levels(dims)] if dims.cp_levels else []
    sequence.share_with(kind, SimpleNamespace(cp=context, hcp=levels or None), dims.cp)
    return context, [context, *levels]


def _levels(dims: ParallelDims) -> Iterator[Members]:
    """Members of the groups that exchange heads, and of those that pass keys on."""
    assert dims.cp_levels is not None
    inner, outer = dims.cp_levels
    contexts = sorted({dims.members("cp", rank) for rank in range(dims.world_size)})
    yield [members[n * inner : (n + 1) * inner] for members in contexts for n in range(outer)]
    yield [members[n::inner] for members in contexts for n in range(inner)]


def _mine(every: Members, rank: int) -> dist.ProcessGroup:
    """The group with this rank; all ranks make all groups."""
    groups = {members: dist.new_group(list(members)) for members in every}
    return next(group for members, group in groups.items() if rank in members)
