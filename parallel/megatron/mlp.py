"""The dense MLP of a decoder layer for megatron-core, on PyTorch alone."""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from mswift.converters.spec import ModelSpec
from mswift.parallel.activations import activation_class
from mswift.parallel.megatron.linears import BiasedColumnParallelLinear, BiasedRowParallelLinear


def dense_mlp_spec(spec: ModelSpec) -> ModuleSpec:
    """Up (and, if gated, gate), the activation, down."""
    column = BiasedColumnParallelLinear if spec.mlp_bias else ColumnParallelLinear
    row = BiasedRowParallelLinear if spec.mlp_bias else RowParallelLinear
    return ModuleSpec(module=MLP, submodules=MLPSubmodules(column, activation_class(spec), row))
