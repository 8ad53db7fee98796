"""What crosses the ranks of a context-parallel group. Shapes: n ranks, s rows of one rank; any further dimensions."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gather_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """[s, ...] -> [n * s, ...], one rank's rows after the other's."""
    out = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def sum_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """[n * s, ...] -> [s, ...]: this rank's rows of the sum over the ranks."""
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


class Passing(NamedTuple):
    """A tensor on its way round the ring."""

    received: Tensor
    sent: Tensor
    works: list[Any]

    def wait(self) -> Tensor:
        """What the rank before this one has sent."""
        for work in self.works:
            work.wait()
        return self.received


def pass_on(x: Tensor, group: ProcessGroup) -> Passing:
    """Begin to send x to the next rank of the ring and to receive the previous one's."""
    x = x.contiguous()
    received = torch.empty_like(x)
    rank, size = group.rank(), group.size()
    to, source = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    operations = [dist.P2POp(dist.isend, x, to, group), dist.P2POp(dist.irecv, received, source, group)]
    return Passing(received, x, dist.batch_isend_irecv(operations))


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _AllToAll.apply(gradient, ctx.group), None  # type: ignore[no-untyped-call]


def all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    """[n, ...]: part i goes to rank i; the result's part i came from rank i."""
    return _AllToAll.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]
