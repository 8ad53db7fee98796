"""Gradients of weights, added straight to the buffer in which the data-parallel wrapper sums them.

Otherwise every microbatch makes a gradient as large as the weight, to be added and freed.
Shapes: n tokens, i in, o out.
"""

import torch
from torch import Tensor

IS_ADDED = "gradient_is_added"
"""Attribute of a weight that only one linear differentiates."""


def add_weight_gradient(weight: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    """Add gradient [n, o]^T @ x [n, i] to `weight.main_grad`; returns what a backward function has to return.

    The wrapper's hook waits for a gradient: what it gets has no values, and the weight the attribute that
    megatron-core's own fused accumulation sets. A weight without a mark, or without a buffer of its dtype, gets its
    gradient as usual.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or buffer.dtype != x.dtype or not hasattr(weight, IS_ADDED):
        return torch.mm(gradient.t(), x)
    if len(x):
        buffer.addmm_(gradient.t(), x)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)
