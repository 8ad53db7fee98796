"""What one rank sends in a step of a run, axis by axis, for the dry run. No torch."""

from mswift.config.train import TrainConfig
from mswift.converters.plan import ModelTable
from mswift.parallel.traffic import StepShape, Traffic, not_covered, sent_by_axis, step_traffic
from mswift.topology import ParallelDims
from mswift.train.memory import stage_parameters

_GB = 1e9


def stage_traffic(
    config: TrainConfig, table: ModelTable, dims: ParallelDims, dtype_bytes: int, pp_rank: int
) -> list[Traffic]:
    """Collectives of a step of one rank of a stage, all samples max_length long. ValueError: `uncounted` says why."""
    if reason := uncounted(config, table, dims):
        raise ValueError(reason)
    unit = (2 * dims.cp if dims.cp > 1 else 1) * (dims.tp if dims.sequence_parallel else 1)
    shape = StepShape(
        microbatches=config.global_batch_size // (config.micro_batch_size * dims.dp),
        rows=config.micro_batch_size,
        length=-(-config.max_length // unit) * unit,
        dtype_bytes=dtype_bytes,
        loss_fusion=config.cross_entropy_loss_fusion,
        cp_comm_type=config.cp_comm_type,
    )
    trained = table.without_mtp()
    experts = stage_parameters(trained, dims, pp_rank, experts_only=True)
    dense = stage_parameters(trained, dims, pp_rank) - experts
    return step_traffic(table.spec, dims, shape, pp_rank, dense, experts)


def uncounted(config: TrainConfig, table: ModelTable, dims: ParallelDims) -> str | None:
    """Why there is no formula for the run; None: there is one."""
    reasons = {
        "adapters": config.trains_adapter,
        "recomputation": config.recompute_granularity is not None,
        "multi-token prediction": bool(config.mtp_num_layers),
    }
    return next((reason for reason, found in reasons.items() if found), not_covered(table.spec, dims))


def sent_line(config: TrainConfig, table: ModelTable, dims: ParallelDims, dtype_bytes: int) -> str:
    """TP 12.3 GB, PP 0.5 GB, DP 3.2 GB of the rank that sends most."""
    if reason := uncounted(config, table, dims):
        return f"not estimated with {reason}"
    stages = [sent_by_axis(stage_traffic(config, table, dims, dtype_bytes, s), dims) for s in range(dims.pp)]
    busiest = max(stages, key=lambda sent: sum(sent.values()))
    parts = ", ".join(f"{axis.upper()} {num_bytes / _GB:.3g} GB" for axis, num_bytes in busiest.items())
    return f"{parts} (a step of the rank that sends most)"
