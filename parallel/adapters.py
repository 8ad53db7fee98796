"""Adapters on a model of megatron-core: attached, named for checkpoints and filled. The layers: `mswift.parallel.lora`.

Import after `mswift.parallel.device.prepare`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from mswift.converters.adapters import (
    SAVABLE,
    Block,
    expand_modules_to_save,
    fused_blocks,
    kv_groups,
    trained_name,
)
from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable
from mswift.converters.rule import LAYERS
from mswift.parallel.engine import AdapterSource
from mswift.parallel.fused_lora import FusedLora
from mswift.parallel.lora import SLOT, ParameterLora, Slot
from mswift.parallel.megatron.linears import DuplicatedLinear
from mswift.tuners.lora import Adapted, LoraConfig, adapted
from mswift.tuners.shapes import promised_shapes

_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_EXPERTS = "mlp.experts"
_MATRICES = ("mlp.router.weight", "mlp.shared_experts.gate_weight")
"""What megatron-core has as parameters of modules that are no linears."""


class AdapterTensor(NamedTuple):
    """A trained parameter (or a buffer, `LoraPair.start_A`) of an adapter run and what it is of the whole.

    Replicated ones have the same regions on several ranks; a padded vocabulary has more rows than its regions.
    """

    slot: Slot
    parameter: Tensor


def add_lora(
    model_chunks: Sequence[nn.Module], table: ModelTable, config: LoraConfig, modules_to_save: Sequence[str] = ()
) -> None:
    """Freeze the base and add adapters in place; call before the DDP wrap, so that nothing frozen gets a buffer.

    modules_to_save: embed_tokens, lm_head, trained in full (tied: one matrix, either name means it). Adapters take
    the dtype of the base weight; a bfloat16 run keeps fp32 masters of them like of any trained parameter.
    """
    own = config.own_table(table)
    attach = _Attach(own, adapted(own, config), config.seed)
    for chunk in model_chunks:
        chunk.requires_grad_(False)
        for layer in get_attr_wrapped_model(chunk, "decoder").layers:
            attach.layer(layer, layer.layer_number - 1)
        _unfreeze(chunk, table, modules_to_save)


class _Attach:
    """Attaches the adapters of one layer after the other. named: linear or parameter -> its adapter."""

    def __init__(self, table: ModelTable, named: Mapping[str, Adapted], seed: int) -> None:
        self.table, self.named, self.seed = table, named, seed
        self.dense, self.experts = fused_blocks(table), fused_blocks(table, experts=True)
        rules = (tensor.rule for tensor in table.megatron.values())
        self.matrices = {
            path: rule.parts[0].hf for rule in rules if (path := rule.megatron.removeprefix(LAYERS)) in _MATRICES
        }

    def layer(self, layer: nn.Module, number: int) -> None:
        parts = dict(layer.named_modules())
        for path, blocks in self.dense.items():  # a layer with experts lacks the dense MLP, and the other way round
            if path in parts:
                self._linear(parts[path], blocks, kv_groups(self.table, path), number)
        if _EXPERTS in parts:
            self._experts(parts[_EXPERTS], number)
        for path, hf in self.matrices.items():
            module, _, attribute = path.rpartition(".")
            weight_name = hf.format(l=number)
            own = self.named.get(weight_name) or self.named.get(weight_name.removesuffix(".weight"))
            if module in parts and own is not None:
                parts[module].lora = ParameterLora(own, self.seed, getattr(parts[module], attribute))

    def _experts(self, experts: nn.Module, number: int) -> None:
        assert isinstance(experts, SequentialMLP)
        first = experts.ep_group.rank() * experts.num_local_experts
        for path, blocks in self.experts.items():
            for i, expert in enumerate(experts.local_experts):
                self._linear(getattr(expert, path.rpartition(".")[2]), blocks, 1, number, first + i)

    def _linear(
        self, base: nn.Module, blocks: Sequence[Block], groups: int, number: int, expert: int | None = None
    ) -> None:
        """Adapters on one base, if one of its blocks has any."""
        own: list[tuple[Adapted | None, Block]] = []
        for block in blocks:
            found = self.named.get(block.hf.format(l=number, e=expert))
            if found is not None and found.num_experts > 1:
                assert expert is not None
                found = replace(found, expert=expert)
            own.append((found, block))
        if not any(found for found, _ in own):
            return
        if not isinstance(base, ColumnParallelLinear | RowParallelLinear | DuplicatedLinear):
            name = type(base).__name__
            raise TypeError(f"LoRA knows column-parallel, row-parallel and duplicated linears, not {name}")
        lora = FusedLora(own, self.seed, base, groups)
        base.add_module("lora", lora)

        def add_delta(
            base: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]
        ) -> tuple[Tensor, Tensor | None]:
            bias = None if getattr(base, "skip_bias_add", True) else base.bias  # added to the output, or apart
            return lora(args[0], output[0], base.weight, bias), output[1]

        base.register_forward_hook(add_delta)


def adapter_tensors(model_chunks: Sequence[nn.Module]) -> Iterator[AdapterTensor]:
    """What this rank trains in an adapter run, by PEFT name (`model.layers.0.self_attn.q_proj.lora_A.weight`).

    A tied embedding is `model.embed_tokens.weight`, also where the last pipeline stage holds its copy.
    """
    for chunk in model_chunks:
        for parameter in chain(chunk.parameters(), nn.Module.buffers(chunk)):  # a wrapper has other "buffers"
            slot = getattr(parameter, SLOT, None)
            if slot is not None:
                yield AdapterTensor(slot, parameter)


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
    saved = expand_modules_to_save(table, modules_to_save)
    source.check(promised_shapes(config.own_table(table), replace(config.settings, modules_to_save=saved)))
    with torch.no_grad():
        for slot, parameter in adapter_tensors(model_chunks):
            first = 0
            for region in slot.regions:
                parameter[first : first + region.sizes[0]].copy_(_read(source, slot, region))
                first += region.sizes[0]


def _read(source: AdapterSource, slot: Slot, region: Region) -> Tensor:
    """A region of [out, rank, expert] lies in whole rows of PEFT's [out, rank * expert]."""
    if len(slot.shape) < 3:
        return source.read(slot.name, region)
    (first, _, expert), (count, rank, _), num_experts = region.offsets, region.sizes, slot.shape[2]
    rows = source.read(slot.name, Region((first, 0), (count, rank * num_experts)))
    return rows.view(count, rank, num_experts)[:, :, expert : expert + 1]


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
                setattr(parameter, SLOT, Slot(hf_name, table.hf[hf_name], regions))
