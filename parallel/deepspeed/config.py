"""What the engine of ZeRO needs to know beside the model and the layout, and what DeepSpeed is told of it."""

from dataclasses import dataclass, field
from typing import Any

import torch

from mswift.config.deepspeed import Zero
from mswift.parallel.fsdp.config import HfSettings

_BUCKET = 200_000_000  # elements that are sent at a time, at most


@dataclass(frozen=True, kw_only=True)
class DeepspeedConfig(HfSettings):
    """zero: stage and place of the state. BF16 keeps fp32 masters, cut over ranks, and gradients in bf16 until they are
    summed in fp32; adapters that are no LoRA are fp32."""

    zero: Zero = field(default_factory=lambda: Zero(2))

    @property
    def trains_bf16(self) -> bool:
        """Whether what is trained is bf16 where it computes; adapters that are no LoRA are fp32 in a bf16 model."""
        return self.dtype == "BF16" and self.method is None


def library_config(
    config: DeepspeedConfig, world_size: int, device: torch.device, trained: int, hidden_size: int
) -> dict[str, Any]:
    """DeepSpeed's own configuration; trained: elements that are.

    Gradients are summed over ranks, not averaged (ZeRO-3 only averages: its losses are multiplied). A step's
    microbatches are counted by the engine, not by DeepSpeed.
    """
    zero, on_gpu = config.zero, device.type == "cuda"
    bucket = max(min(_BUCKET, trained + trained % 2), 2)
    sizes: dict[str, Any] = {"reduce_bucket_size": bucket}
    if zero.stage < 3:
        sizes |= {"allgather_bucket_size": bucket}
    else:
        sizes |= {"stage3_param_persistence_threshold": 10 * hidden_size, "memory_efficient_linear": False}
    own: dict[str, Any] = {"stage": zero.stage, "overlap_comm": False} | sizes | dict(zero.options)
    place = {"device": "cpu", "pin_memory": on_gpu}
    if zero.offload != "none":
        own["offload_optimizer"] = place
    if zero.offload == "all":
        own["offload_param"] = place
    whole: dict[str, Any] = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_grad,
        "zero_optimization": own,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
    }
    if zero.stage < 3:
        whole["gradient_allreduce_op"] = "sum"
    if config.trains_bf16:
        whole |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return whole | dict(zero.passed_on)
