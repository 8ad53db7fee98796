"""LoRA on column-parallel, row-parallel and duplicated linears, one A and B per HF linear, whatever Megatron fuses.

Shapes: ... tokens (s/tp, b under sequence parallelism before a column base, after a row base), i/o features of an HF
linear, r rank, R the sum of the ranks of the linears fused in one base, O the sum of their o. The base is unchanged;
a forward hook adds scale * B(A(x)).

  column base (qkv, fc1)   A [r, i] replicated     B [o/tp, r] cut like the base's rows
  row base (proj, fc2)     A [r, i/tp] cut         B [o, r] replicated
  whole base (MLA's down)  A [r, i] replicated     B [o, r] replicated

What crosses ranks is r wide, never i or o wide. Under sequence parallelism the replicated matrix sees a part of the
sequence, so its gradient is a partial sum: `sequence_parallel=True` has megatron-core sum it over the TP group.
Without it the sums of the backward pass make its gradient whole, and the same, on every TP rank.
Inside an expert the token dispatcher has gathered the tokens and sums the outputs over the expert-tensor-parallel
ranks. There the replicated matrix itself is what crosses ranks: its gradient is summed in the backward pass.

DoRA (Liu et al. 2024, arXiv 2402.09353) scales every row of weight + scale * B @ A to a length that is trained. As in
PEFT the length that it has is a constant of the step. [O, i] is not made: the squares of the rows are those of the
weight, of the update, and twice their product. A magnitude is cut like B; rows of a row base have a part of their
length on every rank.
Import after `mswift.parallel.device.prepare`.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from mswift.converters.adapters import Block, check_blocks
from mswift.parallel.dropout import dropped
from mswift.parallel.lora import Base, LoraPair, part
from mswift.parallel.megatron.linears import DuplicatedLinear
from mswift.tuners.lora import Adapted


class FusedLora(nn.Module):
    """The adapters of the HF linears that one base fuses, where some of them may have none.

    blocks: what the base is made of, in its order, each with its adapter; a linear that HF fuses itself has several.
    groups: how often the base's local rows repeat [rows of each block] (KV groups of a fused q, k, v; else 1).
    """

    def __init__(self, blocks: Sequence[tuple[Adapted | None, Block]], seed: int, base: Base, groups: int = 1):
        super().__init__()
        self.column, self.group = isinstance(base, ColumnParallelLinear), base.tp_group
        self.row, self.whole = isinstance(base, RowParallelLinear), isinstance(base, DuplicatedLinear)
        self.in_expert = getattr(base, "explicit_expert_comm", False)
        self.sequence_parallel = base.sequence_parallel
        self.groups = groups // self.group.size() if groups > 1 else 1
        rank, size = (self.group.rank(), self.group.size()) if self.column else (0, 1)
        local = [part(block.rows, rank, size) for _, block in blocks]
        self.blocks = [(block.leaf, count) for (_, block), (_, count) in zip(blocks, local, strict=True)]
        for adapted in dict.fromkeys(owner for owner, _ in blocks if owner is not None):
            check_blocks(adapted.name, adapted.out_features, [block for owner, block in blocks if owner == adapted])
            rows = [
                (block.start + first, count)
                for (owner, block), (first, count) in zip(blocks, local, strict=True)
                if owner == adapted
            ]
            self.add_module(adapted.leaf, LoraPair(adapted, seed, base, rows))
        self.scale, self.dora = next((pair.scale, pair.adapted.dora) for pair in self.pairs().values())

    def pairs(self) -> dict[str, LoraPair]:
        """HF leaf name -> its A and B, in the order of the base."""
        return {leaf: cast(LoraPair, pair) for leaf, pair in self.named_children()}

    def forward(self, x: Tensor, base_output: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., i], base_output [..., O]: base_output + scale * B(A(x)), rows as the base lays them.

        weight [O, i] is the base's, bias [O] what base_output has in it.
        """
        a, b = self.matrices()
        z = self._across_ranks(self._down(x, a))  # [..., R]
        if not self.dora:
            flat = torch.addmm(base_output.flatten(0, -2), z.flatten(0, -2), b.t(), alpha=self.scale)
            return flat.view_as(base_output)
        factor = self._rescaling(weight, a, b)
        plain = base_output if bias is None else base_output - bias
        return base_output + (factor - 1) * plain + factor * (self.scale * F.linear(z, b))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A [R, i] and B [O, R] of the whole base."""
        return self._joined_a(), self._fused_b()

    @property
    def drops(self) -> bool:
        """Whether it has dropout."""
        return any(pair.adapted.dropout for pair in self.pairs().values())

    def _down(self, x: Tensor, a: Tensor) -> Tensor:
        """A(x) [..., R]; every linear drops elements of x of its own."""
        if not self.drops:
            return F.linear(x, a)
        pairs = self.pairs().values()
        sliced = self.sequence_parallel and not self.row
        first_token = self.group.rank() * x.shape[0] if sliced else 0
        parts, row = [], 0
        for pair in pairs:
            own, row = a[row : row + pair.rank], row + pair.rank
            known = {"first_token": first_token, "first_feature": pair.first_input}
            parts.append(F.linear(dropped(x, pair.adapted.name, pair.adapted.dropout, **known), own))
        return torch.cat(parts, dim=-1)

    def _across_ranks(self, z: Tensor) -> Tensor:
        if self.whole or self.in_expert:
            return z
        if self.column and self.sequence_parallel:
            crossed: Tensor = gather_from_sequence_parallel_region(z, group=self.group)
        elif self.column:
            crossed = copy_to_tensor_model_parallel_region(z, group=self.group)
        elif self.sequence_parallel:
            crossed = reduce_scatter_to_sequence_parallel_region(z, group=self.group)
        else:
            crossed = reduce_from_tensor_model_parallel_region(z, group=self.group)
        return crossed

    def _joined_a(self) -> Tensor:
        """The As as one [R, i]."""
        matrices = [pair.matrix_a() for pair in self.pairs().values()]
        joined = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        return self._summed_gradient(joined) if self.in_expert and self.column else joined

    def _fused_b(self) -> Tensor:
        """The Bs as one [O, R], in the row order of the base, zero where a linear has no adapter.

        Interleaving this small matrix is cheaper than interleaving the wide outputs. All have the scale of the first.
        """
        pairs = self.pairs()
        matrices = {
            leaf: pair.matrix_b() if pair.scale == self.scale else pair.matrix_b() * (pair.scale / self.scale)
            for leaf, pair in pairs.items()
        }
        if len({leaf for leaf, _ in self.blocks}) == 1 and self.groups == 1:  # HF fuses what the base does
            b = matrices[self.blocks[0][0]]
            return self._summed_gradient(b) if self.in_expert and self.row else b
        before, width = 0, sum(pair.rank for pair in pairs.values())
        for leaf, pair in pairs.items():
            matrices[leaf] = F.pad(matrices[leaf], (before, width - before - pair.rank))
            before += pair.rank
        return self.laid_out(matrices)

    def laid_out(self, matrices: Mapping[str, Tensor]) -> Tensor:
        """[o, w] of each adapted linear -> [O, w] in the row order of the base, zero where there is none."""
        some = next(iter(matrices.values()))
        used, blocks = dict.fromkeys(matrices, 0), []
        for leaf, rows in self.blocks:
            if leaf in matrices:
                block = matrices[leaf][used[leaf] : used[leaf] + rows]
                used[leaf] += rows
            else:
                block = some.new_zeros(rows, some.shape[1])
            blocks.append(block.reshape(self.groups, rows // self.groups, some.shape[1]))
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def _summed_gradient(self, matrix: Tensor) -> Tensor:
        summed: Tensor = copy_to_tensor_model_parallel_region(matrix, group=self.group)
        return summed

    def _rescaling(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Magnitude / length of every row [O], 1 where a linear has no adapter."""
        lengths = self.lengths(weight, a, b)
        magnitudes = {leaf: cast(Tensor, pair.lora_magnitude_vector)[:, None] for leaf, pair in self.pairs().items()}
        if len(magnitudes) < len({leaf for leaf, _ in self.blocks}):
            ones = {leaf: torch.ones_like(value) for leaf, value in magnitudes.items()}
            return torch.where(self.laid_out(ones)[:, 0] > 0, self.laid_out(magnitudes)[:, 0] / lengths, 1)
        return self.laid_out(magnitudes)[:, 0] / lengths

    @torch.no_grad()
    def lengths(self, weight: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """Length [O] of every row of weight + scale * B @ A, computed in fp32, in the weight's dtype."""
        a, b = self._joined_a() if a is None else a, self._fused_b() if b is None else b
        update = b.float() * self.scale
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        squares += 2 * (F.linear(weight, a).float() * update).sum(dim=1)
        squares += ((update @ (a.float() @ a.float().t())) * update).sum(dim=1)
        if self.row and self.group.size() > 1:
            dist.all_reduce(squares, group=self.group)
        return squares.sqrt().to(weight.dtype)
