"""A model with the structure of another and a fraction of its size, for the proof of a layout. No torch.

What a layout cuts or what decides how the code runs is kept: which kinds of layers there are, biases, norms, ties,
rotary embedding, head dimension, how many query heads share a key, how the experts are chosen, whether the vocabulary
needs padding. Everything has at least two units on each rank where the model has more than one.
"""

import math
from dataclasses import replace
from typing import Any

from mswift.converters.plan import ModelTable, table_for
from mswift.converters.spec import DeltaSpec, LayerSpec, MambaSpec, MlaSpec, ModelSpec, MoeSpec
from mswift.topology import ParallelDims

_HIDDEN, _COLUMNS, _VOCAB = 64, 24, 96
_WINDOW = 9  # shorter than the samples of the proof, so that it masks something
_MOST_CHOSEN = 4


def scaled_table(config: dict[str, Any], dims: ParallelDims) -> ModelTable:
    """The table of the small model for proofs of layout `dims`; `config` is the config.json of the large one."""
    table = table_for(config)
    return ModelTable(config, table.family, scaled_spec(table.spec, dims), table.spelling)


def scaled_spec(spec: ModelSpec, dims: ParallelDims) -> ModelSpec:
    """`spec` with sizes that are as divisible by the layout as before."""
    layers = _layers(spec, dims)
    sharing = dims.tp * dims.cp  # context parallelism may exchange heads
    groups = _few(spec.num_kv_heads, dims.tp if spec.num_kv_heads % sharing else sharing)
    heads = groups * _few(spec.num_attention_heads // spec.num_kv_heads, 1)
    return replace(
        spec,
        num_layers=len(layers),
        layers=layers if spec.layers else (),
        hidden_size=_HIDDEN,
        num_attention_heads=heads,
        num_kv_heads=groups,
        ffn_hidden_size=_columns(spec.ffn_hidden_size, dims.tp),
        vocab_size=_VOCAB * dims.tp + spec.vocab_size % dims.tp,
        moe=spec.moe and _moe(spec.moe, dims),
        mla=spec.mla and _mla(spec.mla),
        mamba=spec.mamba and _mamba(spec.mamba, dims.tp),
        delta=spec.delta and _delta(spec.delta, dims.tp),
    )


def _few(number: int, ranks: int) -> int:
    """One or two on each of the ranks; the number itself where it does not divide."""
    return number if number % ranks else ranks * min(number // ranks, 2)


def _columns(number: int, ranks: int) -> int:
    return number if number % ranks else ranks * min(number // ranks, _COLUMNS)


def scaled_dims(spec: ModelSpec, dims: ParallelDims) -> ParallelDims:
    """`dims` for the small model: of model chunks with unequal layers the least have one each, the larger ones two."""
    if dims.chunk_layers is None:
        return dims
    least = min(n for n in dims.chunk_layers if n)
    small = [min(n, 1) + (n > least) for n in dims.chunk_layers]
    times = -(-len(_kinds(spec)) // sum(small))
    return replace(dims, chunk_layers=tuple(times * n for n in small))


def _kinds(spec: ModelSpec) -> list[LayerSpec]:
    return list(dict.fromkeys(spec.layer(n) for n in range(spec.num_layers)))


def _layers(spec: ModelSpec, dims: ParallelDims) -> tuple[LayerSpec, ...]:
    """Every kind of layer in turn, at least two layers, as many on each model chunk (or those of `scaled_dims`)."""
    kinds, chunks = _kinds(spec), dims.pp * (dims.vpp or 1)
    count = -(-max(len(kinds), 2, chunks) // chunks) * chunks
    if dims.chunk_layers is not None:
        count = sum(dims.chunk_layers)
    layers = [kinds[n * len(kinds) // count] for n in range(count)]
    return tuple(layer if layer.window is None else replace(layer, window=_WINDOW) for layer in layers)


def _moe(moe: MoeSpec, dims: ParallelDims) -> MoeSpec:
    top_k = min(moe.top_k, _MOST_CHOSEN)
    unit = math.lcm(dims.ep, moe.num_groups)
    least = max(2 * top_k, 2 * moe.num_groups, 2 * dims.ep)
    fewer = -(-least // unit) * unit
    num_experts = moe.num_experts if moe.num_experts % unit else min(moe.num_experts, fewer)
    return replace(
        moe,
        num_experts=num_experts,
        top_k=min(top_k, moe.topk_groups * (num_experts // moe.num_groups)),
        ffn_hidden_size=_columns(moe.ffn_hidden_size, dims.sizes["etp"]),
        shared_ffn_hidden_size=_columns(moe.shared_ffn_hidden_size, dims.tp),
    )


def _mla(mla: MlaSpec) -> MlaSpec:
    return replace(
        mla, q_lora_rank=mla.q_lora_rank and min(mla.q_lora_rank, 24), kv_lora_rank=min(mla.kv_lora_rank, 32)
    )


def _mamba(mamba: MambaSpec, tp: int) -> MambaSpec:
    groups = _few(mamba.num_groups, tp)
    heads = groups * _few(mamba.num_heads // mamba.num_groups, 1)
    norm_groups = groups if mamba.norm_groups == mamba.num_groups else mamba.norm_groups
    return replace(mamba, num_heads=heads, num_groups=groups, norm_groups=norm_groups)


def _delta(delta: DeltaSpec, tp: int) -> DeltaSpec:
    keys = _few(delta.num_key_heads, tp)
    return replace(
        delta, num_key_heads=keys, num_value_heads=keys * _few(delta.num_value_heads // delta.num_key_heads, 1)
    )
