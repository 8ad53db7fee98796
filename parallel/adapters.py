"""LoRA on column-parallel, row-parallel and duplicated linears, one A and B per HF linear, whatever Megatron fuses.

Shapes: s sequence (s/tp under sequence parallelism before a column base, after a row base), b batch, i/o features of
an HF linear, r rank, n linears fused in one base. The base is unchanged; a forward hook adds scale * B(A(x)).

  column base (qkv, fc1)   A [r, i] replicated     B [o/tp, r] cut like the base's rows
  row base (proj, fc2)     A [r, i/tp] cut         B [o, r] replicated
  whole base (MLA's down)  A [r, i] replicated     B [o, r] replicated

What crosses ranks is r wide, never i or o wide. Under sequence parallelism the replicated matrix sees a part of the
sequence, so its gradient is a partial sum: `sequence_parallel=True` has megatron-core sum it over the TP group.
Without it the sums of the backward pass make its gradient whole, and the same, on every TP rank.
Import after `mswift.parallel.device.prepare`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from mswift.converters.adapters import (
    SAVABLE,
    Block,
    HfLinear,
    LoraConfig,
    adapter_shapes,
    check_blocks,
    expand_modules_to_save,
    fused_blocks,
    kv_groups,
    linears,
    trained_name,
)
from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable
from mswift.parallel.megatron.linears import DuplicatedLinear
from mswift.tuners.init import kaiming_uniform

Base: TypeAlias = ColumnParallelLinear | RowParallelLinear | DuplicatedLinear
_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_SLOT = "adapter_slot"


class AdapterTensor(NamedTuple):
    """A trained parameter of an adapter run and what it is of the whole.

    The rows of `parameter` are `regions` of the tensor `name` [*shape], one after the other (a padded vocabulary has
    more rows). Replicated parameters have the same regions on several ranks.
    """

    name: str
    shape: tuple[int, ...]
    regions: tuple[Region, ...]
    parameter: nn.Parameter


class AdapterSource(Protocol):
    """Where trained values come from: a PEFT directory (`mswift.tuners.adapter.PeftAdapter`)."""

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None: ...
    def read(self, name: str, region: Region) -> Tensor: ...


class LoraPair(nn.Module):
    """A and B of one HF linear, this rank's part: of B the given rows (first, count), one after the other."""

    def __init__(self, linear: HfLinear, config: LoraConfig, base: Base, rows: Sequence[tuple[int, int]]):
        super().__init__()
        weight, rank, size = base.weight, base.tp_group.rank(), base.tp_group.size()
        inputs = (0, linear.in_features)
        if isinstance(base, RowParallelLinear):
            inputs = _part(linear.in_features, rank, size)
        name_a, name_b = linear.lora_names()
        start = torch.from_numpy(kaiming_uniform(config.seed, name_a, config.rank, linear.in_features))
        start = start[:, inputs[0] : inputs[0] + inputs[1]]
        self.lora_A = nn.Parameter(start.to(device=weight.device, dtype=weight.dtype, copy=True).contiguous())
        self.lora_B = nn.Parameter(weight.new_zeros(sum(count for _, count in rows), config.rank))
        shape_a, shape_b = linear.lora_shapes(config.rank).values()
        _mark(self.lora_A, name_a, shape_a, [Region((0, inputs[0]), (config.rank, inputs[1]))])
        _mark(self.lora_B, name_b, shape_b, [Region((first, 0), (count, config.rank)) for first, count in rows])
        cut_a, cut_b = isinstance(base, RowParallelLinear), isinstance(base, ColumnParallelLinear)
        for parameter, is_cut, dim in ((self.lora_A, cut_a, 1), (self.lora_B, cut_b, 0)):
            parameter.allreduce = True  # type: ignore[attr-defined]  # not an expert: reduced over data parallel ranks
            if is_cut:
                set_tensor_model_parallel_attributes(parameter, True, dim, 1)
            else:
                parameter.sequence_parallel = base.sequence_parallel  # type: ignore[attr-defined]


class FusedLora(nn.Module):
    """The adapters of the n HF linears that one base fuses, where some of them may have none.

    blocks: what the base is made of, in its order, each with its linear; a linear that HF fuses itself has several.
    groups: how often the base's local rows repeat [rows of each block] (KV groups of a fused q, k, v; else 1).
    """

    def __init__(self, blocks: Sequence[tuple[HfLinear, Block]], config: LoraConfig, base: Base, groups: int):
        super().__init__()
        self.column, self.group = isinstance(base, ColumnParallelLinear), base.tp_group
        self.whole = isinstance(base, DuplicatedLinear)
        self.sequence_parallel, self.scale, self.rank = base.sequence_parallel, config.scale, config.rank
        self.groups = groups // self.group.size() if groups > 1 else 1
        rank, size = (self.group.rank(), self.group.size()) if self.column else (0, 1)
        local = [_part(block.rows, rank, size) for _, block in blocks]
        self.blocks = [(linear.leaf, count) for (linear, _), (_, count) in zip(blocks, local, strict=True)]
        for linear in dict.fromkeys(linear for linear, _ in blocks):
            if linear.leaf in config.target_modules:
                check_blocks(linear, [block for owner, block in blocks if owner == linear])
                rows = [
                    (block.start + first, count)
                    for (owner, block), (first, count) in zip(blocks, local, strict=True)
                    if owner == linear
                ]
                self.add_module(linear.leaf, LoraPair(linear, config, base, rows))

    def pairs(self) -> dict[str, LoraPair]:
        """HF leaf name -> its A and B, in the order of the base."""
        return {leaf: cast(LoraPair, pair) for leaf, pair in self.named_children()}

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """x [s, b, i], base_output [s, b, sum o]: base_output + scale * B(A(x)), rows as the base lays them."""
        matrices: list[Tensor] = [pair.lora_A for pair in self.pairs().values()]
        a = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        z = self._across_ranks(F.linear(x, a))  # [s, b, r * n]
        flat = torch.addmm(base_output.flatten(0, 1), z.flatten(0, 1), self._fused_b().t(), alpha=self.scale)
        return flat.view_as(base_output)

    def _across_ranks(self, z: Tensor) -> Tensor:
        if self.whole:
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

    def _fused_b(self) -> Tensor:
        """The Bs as one [sum o, r * n], in the row order of the base, zero where a linear has no adapter.

        Interleaving this small matrix is cheaper than interleaving the wide outputs.
        """
        pairs = self.pairs()
        if len(self.blocks) == 1:
            return pairs[self.blocks[0][0]].lora_B
        width = self.rank * len(pairs)
        before = {leaf: self.rank * i for i, leaf in enumerate(pairs)}  # its columns among those of all
        used, blocks = dict.fromkeys(pairs, 0), []
        for leaf, rows in self.blocks:
            if leaf in pairs:
                block = pairs[leaf].lora_B[used[leaf] : used[leaf] + rows]
                block = F.pad(block, (before[leaf], width - before[leaf] - self.rank))
                used[leaf] += rows
            else:
                block = next(self.parameters()).new_zeros(rows, width)
            blocks.append(block.view(self.groups, rows // self.groups, width))
        return torch.cat(blocks, dim=1).flatten(0, 1)


def add_lora(
    model_chunks: Sequence[nn.Module], table: ModelTable, config: LoraConfig, modules_to_save: Sequence[str] = ()
) -> None:
    """Freeze the base and add adapters in place; call before the DDP wrap, so that nothing frozen gets a buffer.

    modules_to_save: embed_tokens, lm_head, trained in full (tied: one matrix, either name means it). Adapters take
    the dtype of the base weight; a bfloat16 run keeps fp32 masters of them like of any trained parameter.
    """
    modules = {linear.name: linear for linear in linears(table)}
    fused = fused_blocks(table)
    for chunk in model_chunks:
        chunk.requires_grad_(False)
        for layer in get_attr_wrapped_model(chunk, "decoder").layers:
            parts = dict(layer.named_modules())
            for path, blocks in fused.items():  # a layer with experts lacks the dense MLP, and the other way round
                if path in parts and not {block.leaf for block in blocks}.isdisjoint(config.target_modules):
                    own = [(modules[block.hf.format(l=layer.layer_number - 1)], block) for block in blocks]
                    _attach(parts[path], own, config, kv_groups(table, path))
        _unfreeze(chunk, table, modules_to_save)


def adapter_tensors(model_chunks: Sequence[nn.Module]) -> Iterator[AdapterTensor]:
    """What this rank trains in an adapter run, by PEFT name (`model.layers.0.self_attn.q_proj.lora_A.weight`).

    A tied embedding is `model.embed_tokens.weight`, also where the last pipeline stage holds its copy.
    """
    for chunk in model_chunks:
        for parameter in chunk.parameters():
            slot = getattr(parameter, _SLOT, None)
            if slot is not None:
                name, shape, regions = slot
                yield AdapterTensor(name, shape, regions, parameter)


def load_adapter(
    model_chunks: Sequence[nn.Module],
    table: ModelTable,
    config: LoraConfig,
    modules_to_save: Sequence[str],
    source: AdapterSource,
) -> None:
    """Fill the adapters that `add_lora` made, before the optimizer copies them; reads only this rank's regions.

    Raises CheckpointError where the source has more, fewer or other tensors than this adapter.
    """
    source.check(adapter_shapes(table, config, expand_modules_to_save(table, modules_to_save)))
    with torch.no_grad():
        for name, _, regions, parameter in adapter_tensors(model_chunks):
            first = 0
            for region in regions:
                parameter[first : first + region.sizes[0]].copy_(source.read(name, region))
                first += region.sizes[0]


def _attach(base: nn.Module, blocks: Sequence[tuple[HfLinear, Block]], config: LoraConfig, groups: int) -> None:
    if not isinstance(base, Base):
        raise TypeError(f"LoRA knows column-parallel, row-parallel and duplicated linears, not {type(base).__name__}")
    lora = FusedLora(blocks, config, base, groups)
    base.add_module("lora", lora)

    def add_delta(
        _base: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        return lora(args[0], output[0]), output[1]

    base.register_forward_hook(add_delta)


def _unfreeze(chunk: nn.Module, table: ModelTable, modules_to_save: Sequence[str]) -> None:
    keys = dict(zip(SAVABLE, (_EMBEDDING, _OUTPUT), strict=True))
    parameters = dict(chunk.named_parameters())
    for leaf in expand_modules_to_save(table, modules_to_save):
        for name, parameter in parameters.items():
            if name == keys[leaf] or name.endswith("." + keys[leaf]):
                parameter.requires_grad_(True)
                key = _EMBEDDING if table.spec.tied_embeddings else keys[leaf]
                group = get_attr_wrapped_model(chunk, "pg_collection").tp
                hf_name = trained_name(table, SAVABLE[leaf])
                regions = table.shard(key, group.rank(), group.size())  # none: this rank holds padding only
                _mark(parameter, hf_name, table.hf[hf_name], regions)


def _mark(parameter: nn.Parameter, name: str, shape: tuple[int, ...], regions: Sequence[Region]) -> None:
    setattr(parameter, _SLOT, (name, shape, tuple(regions)))


def _part(features: int, rank: int, size: int) -> tuple[int, int]:
    """(offset, length) of an even cut; `ModelTable.check_tp` has refused sizes that do not divide."""
    return features // size * rank, features // size
