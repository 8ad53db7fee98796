"""A transformers model cut over ranks by FSDP2, block by block, and the groups of ranks that share it."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from mswift.errors import LayoutError
from mswift.parallel.engine import DTYPES
from mswift.parallel.fsdp.config import FsdpConfig
from mswift.parallel.fsdp.four_bit import pack_linears
from mswift.parallel.fsdp.model import TrainedModel, allocate, blocks
from mswift.parallel.fsdp.tuned import TunedModel


@dataclass(frozen=True)
class Layout:
    """sharing: ranks that hold different rows, with this one; copy: number of its group among those that hold all rows.

    groups: all that were made, for the caller to destroy.
    """

    sharing: dist.ProcessGroup
    copy: int
    groups: list[dist.ProcessGroup]


def lay_out(tuned: TunedModel, world_size: int, config: FsdpConfig, device: torch.device) -> Layout:
    """Give the parameters memory, cut over ranks; LayoutError where they cannot be shared by `shard_size` of them."""
    size, model, method = config.shard_size, tuned.model, tuned.method
    if world_size % size:
        raise LayoutError(f"--fsdp_shard_size {size} does not divide the {world_size} ranks")
    copies = world_size // size
    ranks = torch.arange(world_size).view(copies, size)
    mesh = DeviceMesh(device.type, ranks, mesh_dim_names=("replicate", "shard"))
    groups = [mesh.get_group("replicate"), mesh.get_group("shard")]
    found = Layout(mesh.get_group("shard"), dist.get_rank() // size, groups)
    whole_ones = [] if method is None else [*method.replicated.values()]
    if config.four_bit_base is not None:
        sharing = found.sharing if size > 1 else None
        whole_ones += pack_linears(blocks(model.inner), config.four_bit_base, device, sharing, tuned.sources())
    if method is not None:
        method.move(device)
    if world_size == 1 and config.dtype == "F32" and not config.cpu_offload:
        allocate(model, device)
        return found
    used = mesh["shard"] if copies == 1 else mesh
    dtype, reshard = DTYPES[config.dtype], config.reshard_after_forward
    shard(model, used, dtype, device, reshard, config.cpu_offload, whole_ones)
    return found


def shard(
    model: TrainedModel,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    device: torch.device,
    reshard: bool,
    offload: bool,
    whole: Collection[nn.Parameter] = (),
) -> None:
    """Cut every parameter over the last axis of `mesh`, block by block: memory for one whole block at a time.

    Computes in `dtype` and sums gradients in fp32. reshard: blocks are let go of after forward, and gathered again.
    offload: the cut parameters and their gradients lie in host memory, pinned where there is a GPU. whole: parameters
    that stay as they are on every rank.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": place}
    options["ignored_params"] = set(whole) or None
    layers = blocks(model.inner)
    for layer in layers:
        allocate(layer, device)
        fully_shard(layer, reshard_after_forward=reshard, **options)
    allocate(model, device)
    fully_shard(model, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are divided by the sum of weights of all ranks
            if mesh.device_type == "cpu":
                module.set_force_sum_reduction_for_comms(True)


@contextmanager
def forward_alone(model: nn.Module) -> Iterator[None]:
    """A pass without a backward one: gathered parameters, which the latter lets go of, are let go of at the end.

    Else the next pass would compute with what they were, and train what was trained then.
    """
    from torch.distributed.fsdp import FSDPModule

    yield
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def last_microbatch(model: nn.Module, is_last: bool) -> Iterator[None]:
    """Gradients are summed over ranks in the last microbatch of a step only."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    yield
