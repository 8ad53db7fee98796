"""ParallelDims -> torch.distributed: join the job, leave it. Knows torch.distributed, not megatron."""

import datetime
import gc
import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mswift.errors import LayoutError
from mswift.launchers.environment import RankInfo
from mswift.launchers.machine import port_refusal
from mswift.parallel.device import backend
from mswift.topology import Coordinate, ParallelDims


@dataclass(frozen=True)
class Groups:
    """This process in the job: its rank, its place on every axis, the device it computes on."""

    dims: ParallelDims
    rank: int
    device: torch.device
    timeout_seconds: float

    @property
    def coordinate(self) -> Coordinate:
        """Place of this rank on the axes."""
        return self.dims.coordinate(self.rank)


def init(dims: ParallelDims, device: torch.device, info: RankInfo, timeout_seconds: float = 1800.0) -> Groups:
    """Join the job of `dims.world_size` ranks; a job of one rank opens no port.

    Collectives that wait longer than `timeout_seconds` fail. A process that has joined already stays in its job.
    Raises LayoutError when the job has another number of ranks than the layout.
    """
    if info.world_size != dims.world_size:
        raise LayoutError(
            f"the layout is for {dims.world_size} ranks, the job has {info.world_size}: "
            f"use --nproc_per_node {dims.world_size}"
        )
    if not dist.is_initialized():
        # The defaults of its functions are the group of all ranks at the time of its import, which then never ends.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group(
            backend(device),
            timeout=datetime.timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,  # NCCL makes its communicators on this GPU
            **_rendezvous(info),
        )
    return Groups(dims, info.rank, device, timeout_seconds)


def give_up_after(groups: Iterable[dist.ProcessGroup], seconds: float) -> None:
    """Collectives of these groups fail after so long; torch has times of its own for groups that are made later."""
    for group in set(groups) - {dist.group.WORLD}:
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def destroy() -> None:
    """Leave the job; nothing happens in a process that never joined one.

    A group's threads end with its last reference, which may lie in a cycle. One that still lets go of a tensor while
    the interpreter ends would abort the process.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.unfreeze()  # mswift.startup
        gc.collect()


def _rendezvous(info: RankInfo) -> dict[str, Any]:
    """How the ranks find each other: not at all when alone, torchrun's own store, or rank 0's address."""
    if info.world_size == 1:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return {"init_method": "env://"}
    if info.rank == 0 and (refusal := port_refusal(info.master_port)):
        raise OSError(f"node {os.uname().nodename}: {refusal}")  # status 1: the next start has another port
    address = f"tcp://{info.master_addr}:{info.master_port}"
    return {"init_method": address, "rank": info.rank, "world_size": info.world_size}
