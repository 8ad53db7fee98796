"""RMSNorm for megatron-core's layer specs that allows sequence parallelism. Shapes: [..., width]."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019), as torch's fused kernel.

    Its weight is replicated over tensor-parallel ranks. Under sequence parallelism each of them sees another part
    of the sequence, so the weight is marked for megatron-core, which then sums its gradient over the ranks.
    """

    def __init__(self, config: object, hidden_size: int, eps: float = 1e-5, **_unused: object) -> None:
        super().__init__()
        self.eps = eps
        dtype: torch.dtype = config.params_dtype  # type: ignore[attr-defined]
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype, device=torch.cuda.current_device()))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., width]; the mean square is taken in fp32."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
