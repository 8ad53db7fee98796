"""Column- and row-parallel linears whose bias is our decision, not megatron-core's single `add_bias_linear`."""

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


class BiasedColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel linear with a bias."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class BiasedRowParallelLinear(RowParallelLinear):
    """A row-parallel linear with a bias."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)
