"""A frozen base in four bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314): the linears of layers, by bitsandbytes.

Every 64 neighbours in a row of a weight share one fp32 scale, as in bitsandbytes' blocks of a whole HF matrix. So a
rank's part of a weight has the same 4-bit values at every layout, and the same as transformers gives it. A weight
exists whole only while it is read, multiplied, or multiplied with a gradient: one at a time.

Shapes: n tokens of this rank's input, i/o features of this rank's part of a linear.
Import after `mswift.parallel.device.prepare`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mswift.errors import LayoutError
from mswift.parallel.four_bit import BLOCK, FourBits, Kind, PackedWeight, library, packed, stand_for
from mswift.parallel.held_codes import CodesWeight, HeldCodes
from mswift.parallel.megatron.cpu_linear import product
from mswift.parallel.megatron.linears import DuplicatedLinear

_LINEARS = (ColumnParallelLinear, RowParallelLinear, DuplicatedLinear)
__all__ = ["FourBitLinear", "linears_without_memory", "pack_linears", "packed"]


class FourBitLinear(torch.autograd.Function):
    """In place of megatron-core's LinearWithFrozenWeight: keeps no weight for the backward pass, but makes it again."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, packed: FourBits, bias: Tensor | None, allreduce: bool, group: dist.ProcessGroup | None
    ) -> Tensor:
        """x [n, b, i] -> [n, b, o]."""
        ctx.packed, ctx.allreduce, ctx.group = packed, allreduce, group
        out = product(x, packed.whole())
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        """Gradient of x."""
        grad_x = product(gradient, ctx.packed.whole().t())
        if ctx.allreduce:
            dist.all_reduce(grad_x, group=ctx.group)
        return grad_x, None, None, None, None


@contextmanager
def linears_without_memory(vocab_rows: int) -> Iterator[None]:
    """While inside, weights of new linears take no memory beyond that of the one being made.

    Those of `vocab_rows` rows keep theirs: the output layer, which may be a copy of the embedding, is one.
    """

    def free(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if name != "weight" or parameter is None or not isinstance(module, _LINEARS):
            return
        if getattr(module, "output_size", None) != vocab_rows:
            parameter.data.untyped_storage().resize_(0)

    hook = register_module_parameter_registration_hook(free)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hook.remove()


def pack_linears(chunks: Sequence[nn.Module], base: Kind | HeldCodes, sources: Mapping[Tensor, frozenset[str]]) -> None:
    """Let the linears of all layers keep four bits a weight. Before weights are read.

    Of chunks made inside `linears_without_memory`. sources: the tensors of files that make each weight. LayoutError
    where a rank's part of a row is not whole blocks.
    """
    if not isinstance(base, HeldCodes):
        library()
    for chunk in chunks:
        for name, module in chunk.named_modules():
            weight = getattr(module, "weight", None)
            if weight is None or not isinstance(module, _LINEARS):
                continue
            if ".layers." not in f".{name}":
                continue
            if isinstance(base, HeldCodes) and not base.has(sources[weight], name):
                weight.data.untyped_storage().resize_(weight.numel() * weight.element_size())
                continue
            _multiply_by(module, _packed(weight, base, name))


def _packed(weight: nn.Parameter, base: Kind | HeldCodes, name: str) -> FourBits:
    if isinstance(base, HeldCodes):
        return stand_for(weight, CodesWeight(weight, base, name, None))
    if weight.shape[1] % BLOCK:
        raise LayoutError(
            f"--quant_bits 4: {name} has {weight.shape[1]} inputs on a rank, which are no whole blocks of "
            f"{BLOCK}: use a smaller --tensor_model_parallel_size, or leave --quant_method out"
        )
    return stand_for(weight, PackedWeight(weight, base))


def _multiply_by(linear: nn.Module, own: FourBits) -> None:
    def multiply(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        gradient_accumulation_fusion: bool = False,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        grad_output_buffer: None = None,
        wgrad_deferral_limit: None = None,
    ) -> Tensor:
        """What megatron-core's linears call, with its names."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        out: Tensor = FourBitLinear.apply(input, own, bias, allreduce_dgrad, tp_group)  # type: ignore[no-untyped-call]
        return out

    linear._forward_impl = multiply  # type: ignore[assignment]
