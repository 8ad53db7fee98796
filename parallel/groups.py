"""ParallelDims -> torch.distributed: join the job, leave it. Knows torch.distributed, not megatron."""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mswift.errors import ConfigError, LayoutError
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


def init(
    dims: ParallelDims,
    device: torch.device,
    timeout_seconds: float = 1800.0,
    *,
    rank: int | None = None,
    init_method: str | None = None,
) -> Groups:
    """Join the job of `dims.world_size` ranks; a job of one rank needs neither variables nor ports.

    Rank and address come from RANK, MASTER_ADDR, MASTER_PORT as torchrun sets them, or from the arguments.
    Collectives that wait longer than `timeout_seconds` fail. A process that has joined already stays in its job.
    Raises LayoutError when the job has another number of ranks, ConfigError when the variables are missing.
    """
    if not dist.is_initialized():
        _join(dims, device, datetime.timedelta(seconds=timeout_seconds), rank, init_method)
    joined = dist.get_world_size()
    if joined != dims.world_size:
        raise LayoutError(f"the layout is for {dims.world_size} ranks, the job has {joined}: use --nproc_per_node {dims.world_size}")
    return Groups(dims, dist.get_rank(), device, timeout_seconds)


def destroy() -> None:
    """Leave the job; nothing happens in a process that never joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(
    dims: ParallelDims, device: torch.device, timeout: datetime.timedelta, rank: int | None, init_method: str | None
) -> None:
    name = backend(device)
    bound = device if device.type == "cuda" else None  # NCCL makes its communicators for this GPU at once
    if dims.world_size == 1 and "RANK" not in os.environ and rank is None:
        dist.init_process_group(name, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, device_id=bound)
        return
    if rank is None and "RANK" not in os.environ:
        raise ConfigError(
            f"the layout is for {dims.world_size} ranks, but this process was started alone: "
            f"use --nproc_per_node {dims.world_size}, or start it with torchrun"
        )
    number = int(os.environ["RANK"]) if rank is None else rank
    size = int(os.environ.get("WORLD_SIZE", dims.world_size)) if rank is None else dims.world_size
    dist.init_process_group(
        name, init_method=init_method, rank=number, world_size=size, timeout=timeout, device_id=bound
    )
