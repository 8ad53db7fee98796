"""A Mamba-2 mixer in the place of self-attention, for megatron-core, on PyTorch alone.

megatron-core's own mixer needs Triton kernels. This one has its parameters, laid out alike: heads and groups are cut
over tensor-parallel ranks, the projections are its column- and row-parallel linears. Shapes: s sequence, b batch,
h heads, g groups, p head dimension, n state size, all of this rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from mswift.converters.spec import MambaSpec
from mswift.parallel.state_space import causal_convolution, state_space_scan


def column_linear(config: TransformerConfig, width: int, group: ProcessGroup) -> ColumnParallelLinear:
    """hidden -> width, its rows cut."""
    return ColumnParallelLinear(
        config.hidden_size,
        width,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=False,
        tp_group=group,
    )


def row_linear(config: TransformerConfig, width: int, group: ProcessGroup) -> RowParallelLinear:
    """width -> hidden, its columns cut."""
    return RowParallelLinear(
        width,
        config.hidden_size,
        config=config,
        init_method=config.output_layer_init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=True,
        tp_group=group,
    )


def cut_vector(config: TransformerConfig, *sizes: int) -> nn.Parameter:
    """An empty parameter whose rows are cut."""
    parameter = nn.Parameter(torch.empty(sizes, dtype=config.params_dtype, device=torch.cuda.current_device()))
    set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    return parameter


def check_whole_sequence(
    config: TransformerConfig, mask: object = None, packed_seq_params: object = None, **_unused: object
) -> None:
    """NotImplementedError for what would need the state of another rank, or a new state inside a row."""
    if config.context_parallel_size > 1:
        raise NotImplementedError("recurrent mixers do not share a sequence between ranks (context parallelism)")
    if mask is not None or packed_seq_params is not None:
        raise NotImplementedError("recurrent mixers take neither a mask nor packed sequences")


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), computed again in the backward pass: a recurrence's own matrices are ten times its inputs."""
    out: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out


class ChannelKernels(nn.Module):
    """The kernels of a convolution of each channel by itself: weight [channels, 1, width], bias [channels] or None."""

    def __init__(self, config: TransformerConfig, channels: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = cut_vector(config, channels, 1, width)
        self.bias = cut_vector(config, channels) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, channels] -> silu of the convolution, [b, s, channels]."""
        return causal_convolution(x, self.weight, self.bias)


class GatedRMSNorm(nn.Module):
    """RMSNorm of x * silu(z) in equal parts of the whole width, which may be more than this rank's."""

    def __init__(self, config: TransformerConfig, width: int, norm_groups: int, group: ProcessGroup) -> None:
        super().__init__()
        self.eps, self._group = config.layernorm_epsilon, group
        self._is_shared = norm_groups < group.size()
        self._groups = 1 if self._is_shared else norm_groups // group.size()
        self.weight = cut_vector(config, width // group.size())

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x fp32 and z [b, s, width of this rank] -> the same shape in z's dtype."""
        x = x * F.silu(z.float())
        if self._is_shared:
            squares = x.square().mean(-1, keepdim=True) / self._group.size()
            squares = reduce_from_tensor_model_parallel_region(squares, group=self._group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self._group)
            normed = x * torch.rsqrt(squares + self.eps)
        else:
            parts = x.unflatten(-1, (self._groups, -1))
            normed = F.rms_norm(parts, (parts.shape[-1],), None, self.eps).flatten(-2)
        return self.weight * normed.to(z.dtype)


class MambaMixer(nn.Module):
    """Mamba-2 (Dao and Gu 2024); called as megatron-core calls self-attention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        mamba: MambaSpec,
        pg_collection: ProcessGroupCollection,
        **_unused: object,
    ) -> None:
        super().__init__()
        check_whole_sequence(config)
        group = pg_collection.tp
        tp, inner = group.size(), mamba.num_heads * mamba.head_dim
        bc = mamba.num_groups * mamba.state_size
        self.config, self._mamba, self._groups = config, mamba, mamba.num_groups // tp
        self._sizes = [size // tp for size in (inner, inner, bc, bc, mamba.num_heads)]
        self.in_proj = column_linear(config, 2 * inner + 2 * bc + mamba.num_heads, group)
        self.conv1d = ChannelKernels(config, sum(self._sizes[1:4]), mamba.conv_kernel, bias=True)
        self.A_log, self.D, self.dt_bias = (cut_vector(config, self._sizes[4]) for _ in range(3))
        self.norm = GatedRMSNorm(config, inner, mamba.norm_groups, group)
        self.out_proj = row_linear(config, inner, group)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """[s (of this rank under sequence parallelism), b, hidden] -> (the same, None)."""
        check_whole_sequence(self.config, attention_mask, **options)
        projected, _ = self.in_proj(hidden_states)
        z, xbc, dt = projected.split([self._sizes[0], sum(self._sizes[1:4]), self._sizes[4]], dim=-1)
        y = self._scan(self.conv1d(xbc).float(), dt.transpose(0, 1).float())
        return self.out_proj(self.norm(y, z.transpose(0, 1)).transpose(0, 1).contiguous())

    def _scan(self, xbc: Tensor, dt: Tensor) -> Tensor:
        """xbc [b, s, h p + 2 g n] and dt [b, s, h], fp32 -> [b, s, h p]."""
        x, b, c = xbc.split(self._sizes[1:4], dim=-1)
        groups = (self._groups, -1)
        x = x.unflatten(-1, (*groups, self._mamba.head_dim))
        dt = F.softplus(dt + self.dt_bias.float())
        if self._mamba.time_step_limit != (0.0, float("inf")):
            dt = dt.clamp(*self._mamba.time_step_limit)
        a = -self.A_log.float().exp()
        y = recomputed(
            state_space_scan,
            x,
            dt.unflatten(-1, groups),
            a.unflatten(0, groups),
            b.unflatten(-1, groups),
            c.unflatten(-1, groups),
            self._mamba.chunk_size,
        )
        return (y + self.D.float().view(*groups, 1) * x).flatten(2)


def mamba_mixer_spec(mamba: MambaSpec) -> ModuleSpec:
    """The mixer of a layer."""
    return ModuleSpec(module=MambaMixer, params={"mamba": mamba})
