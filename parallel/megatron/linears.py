"""Linears that megatron-core lacks: biases of our choice instead of one `add_bias_linear`, weights on every rank."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class BiasedColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel linear with a bias."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class BiasedRowParallelLinear(RowParallelLinear):
    """A row-parallel linear with a bias."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class DuplicatedLinear(nn.Module):
    """A linear that every tensor-parallel rank has whole, applied to the part of the sequence that the rank has.

    Under sequence parallelism its gradient is a sum over the ranks: the weight is marked for megatron-core.
    Shapes: s sequence of this rank, b batch, i and o features.
    """

    def __init__(self, in_features: int, out_features: int, config: TransformerConfig, group: Any) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.sequence_parallel, self.tp_group = config.sequence_parallel, group

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[s, b, i] -> ([s, b, o], no bias), as megatron-core's linears answer."""
        options = {"allreduce_dgrad": False, "sequence_parallel": False, "tp_group": self.tp_group}
        return self._forward_impl(x, self.weight, None, False, **options), None

    def _forward_impl(self, x: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        trained = weight.requires_grad
        product = linear_with_grad_accumulation_and_async_allreduce if trained else linear_with_frozen_weight
        out: Tensor = product(x, weight, *args, **options)
        return out
