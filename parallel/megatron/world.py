"""megatron-core's process groups, which it keeps in globals: the only place in mswift that sets them."""

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from mswift.topology import ParallelDims

_entered: list[ParallelDims] = []


def enter(dims: ParallelDims, seed: int, timeout_seconds: float = 1800.0) -> None:
    """Make megatron-core's groups for this layout; an earlier layout of this process is left first.

    torch.distributed must be running with `dims.world_size` ranks.
    """
    if _entered != [dims]:
        leave()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=dims.tp,
            pipeline_model_parallel_size=dims.pp,
            virtual_pipeline_model_parallel_size=dims.vpp if dims.chunks > 1 else None,
            context_parallel_size=dims.cp,
            hierarchical_context_parallel_sizes=list(dims.cp_levels) if dims.cp_levels else None,
            expert_model_parallel_size=dims.ep,
            expert_tensor_parallel_size=dims.etp,
            distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
            create_gloo_process_groups=False,
        )
        _entered.append(dims)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def leave() -> None:
    """Destroy megatron-core's groups, if there are any; the torch.distributed job stays (or has gone before).

    megatron-core only forgets them, but for one that it keeps. A gloo group has three threads, one of which wakes up
    100 times a second, for as long as anything refers to it.
    """
    if _entered:
        noted = parallel_state._global_process_group_list if dist.is_initialized() else None
        made = [group for group in noted or [] if _is_mine(group)]
        parallel_state.destroy_model_parallel()
        parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None
        for group in made:
            dist.destroy_process_group(group)
    _entered.clear()


def all_finite(device: torch.device, *values: float) -> bool:
    """Whether these values of all ranks are finite; every rank hears the same."""
    finite = torch.tensor(all(map(math.isfinite, values)), dtype=torch.int32, device=device)
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)


def _is_mine(group: object) -> bool:
    """Whether this rank is a member of a group that megatron-core noted down (it notes None for the world)."""
    return group is not None and group is not dist.GroupMember.NON_GROUP_MEMBER


def axes() -> dict[str, str]:
    """Name of each process group of this rank -> the axis that it stands for (as `mswift.parallel.traffic` has them).

    Between two stages megatron-core sends over the group of all ranks, which nothing else does.
    """
    state = parallel_state
    levels = state._HIERARCHICAL_CONTEXT_PARALLEL_GROUPS or (None, None)
    groups = {
        "tp": [state._TENSOR_MODEL_PARALLEL_GROUP],
        "cp": [state._CONTEXT_PARALLEL_GROUP, levels[1]],
        "cp heads": [levels[0]],
        "pp": [state._PIPELINE_MODEL_PARALLEL_GROUP, dist.group.WORLD],
        "dp": [state._DATA_PARALLEL_GROUP_WITH_CP, state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP],
        "ep": [state._EXPERT_MODEL_PARALLEL_GROUP, state._EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP],
        "edp": [state._EXPERT_DATA_PARALLEL_GROUP, state._INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP],
        "embedding": [state._EMBEDDING_GROUP],
    }
    return {group.group_name: axis for axis, of in groups.items() for group in of if group is not None}
