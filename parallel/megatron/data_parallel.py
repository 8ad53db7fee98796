"""megatron-core's data-parallel wrapper: gradients in one fp32 buffer, weights in another, cut over the ranks."""

from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn


class DataParallel(DistributedDataParallel):
    """Without its two collectives where there is one data-parallel rank.

    A reduce-scatter and an all-gather over one rank change nothing, but gloo copies both buffers for them: 3 % of a
    step of a 10M model on a CPU.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.gradient_accumulation_fusion and not self.ddp_config.overlap_grad_reduce:
            for module in self.module.modules():
                if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                    _return_no_gradient(module.weight)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Sum gradients over data-parallel ranks."""
        if self.dp_cp_group.size() > 1:
            super().finish_grad_sync(force_all_reduce=force_all_reduce)

    def start_param_sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather updated weights from data-parallel ranks."""
        if self.dp_cp_group.size() > 1:
            super().start_param_sync(*args, **kwargs)


def _return_no_gradient(weight: nn.Parameter | None) -> None:
    """Have a linear's backward return None for a weight whose gradient it adds to the buffer itself.

    With this attribute megatron-core allocates an unused tensor of the weight's size at every backward, to trigger
    the hook that starts an overlapped reduction.
    """
    if weight is not None and hasattr(weight, "grad_added_to_main_grad"):
        del weight.grad_added_to_main_grad
