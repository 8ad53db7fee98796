"""Memory of one rank of --backend deepspeed, from the table of the model and the stage of ZeRO. No torch, no model."""

import math

from mswift.config.train import TrainConfig
from mswift.converters.plan import ModelTable
from mswift.refusals.deepspeed import zero_of
from mswift.topology import ParallelDims
from mswift.train.memory import StageMemory, activations, end_parameters, stage_parameters
from mswift.train.trained import optimizer_bytes, trained_parameters

ZERO_WEIGHTS = (
    "in the dtype of the run, whole on each rank (ZeRO-3: divided by the ranks, and two gathered layers and the ends "
    "of the model); gradients fp32 (from ZeRO-2 on divided); optimizer its state and fp32 masters, divided"
)
_FP32 = 4


def zero_memory(config: TrainConfig, table: ModelTable, dims: ParallelDims, dtype_bytes: int) -> StageMemory:
    """Estimate for one rank, without what lies in host memory."""
    zero = zero_of(config)
    assert zero is not None
    total, trained = stage_parameters(table, ParallelDims(), 0), trained_parameters(config, table)
    parameters, world = total + trained * config.trains_adapter, dims.world_size
    weights: float = _weights(config, table, dtype_bytes)
    if zero.stage == 3:
        ends = end_parameters(table)
        gathered = 2 * (total - ends) / table.spec.num_layers + ends
        weights = gathered * dtype_bytes + (0 if zero.offload == "all" else weights / world)
    on_device = zero.offload == "none"
    return StageMemory(
        parameters=parameters,
        trained=trained,
        weights_bytes=math.ceil(weights),
        gradients_bytes=math.ceil(trained * _FP32 / (1 if zero.stage == 1 else world) * on_device),
        optimizer_bytes=math.ceil(_state(config, table) / world * on_device),
        activations_bytes=activations(config, table, dims, dtype_bytes, 0),
    )


def zero_host_bytes(config: TrainConfig, table: ModelTable, dims: ParallelDims, dtype_bytes: int) -> int:
    """What one rank keeps in host memory: gradients, masters and state, and parameters with offload_param."""
    zero = zero_of(config)
    if zero is None or zero.offload == "none":
        return 0
    trained = trained_parameters(config, table)
    held = _state(config, table) + trained * _FP32
    held += _weights(config, table, dtype_bytes) if zero.offload == "all" else 0
    return math.ceil(held / dims.world_size)


def _weights(config: TrainConfig, table: ModelTable, dtype_bytes: int) -> int:
    """Bytes of all weights, whole: in the dtype of the run, but fp32 of an adapter that is no LoRA."""
    of_adapter = 0
    if config.trains_adapter:
        of_adapter = trained_parameters(config, table) * (dtype_bytes if config.trains_lora else _FP32)
    return stage_parameters(table, ParallelDims(), 0) * dtype_bytes + of_adapter


def _state(config: TrainConfig, table: ModelTable) -> int:
    """Bytes of the optimizer's state and of the masters, which ZeRO has in every dtype."""
    return optimizer_bytes(config, table) + trained_parameters(config, table) * _FP32
