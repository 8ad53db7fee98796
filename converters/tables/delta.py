"""What models with gated delta net layers share (Yang et al. 2024, Qwen3-Next): the rules of such a layer.

megatron-core stores the input projection in its parts query, key, value, z, beta, alpha, each of all heads, and the
convolution in query, key, value (`GatedDeltaNet.sharded_state_dict`). Hugging Face has two projections whose rows are
grouped by key head: its query, its key, its value heads' values, their gates z; and their beta, their alpha.
"""

from collections.abc import Sequence
from dataclasses import replace

from mswift.converters.fields import Fields
from mswift.converters.rule import LAYERS, MTP_LAYERS, Drop, Rule
from mswift.converters.rules import columns, gated_qkv, in_mtp, rows, rows_of, same, unit_rows_of
from mswift.converters.spec import DeltaSpec

M = LAYERS + "self_attention."
H = "model.layers.{l}."
MIXER = H + "linear_attn."

_MLP_NORM = LAYERS + "mlp.linear_fc1.layer_norm_weight"
_KEY_ROWS, _VALUE_ROWS = "delta_key_dim", "delta_values_per_key*delta_value_dim"
_KEYS, _VALUES = "delta_key_heads*delta_key_dim", "delta_value_heads*delta_value_dim"
_KEY_HEADS, _VALUE_HEADS = rows("delta_key_heads"), rows("delta_value_heads")
_OUT = columns("delta_value_heads")


def _grouped(hf: str, parts: tuple[tuple[str, str], ...]) -> tuple[Rule, ...]:
    """Megatron tensors in_proj.weight.<part>, from the rows of each part in the group of every key head."""
    sizes = [size for _, size in parts]
    return tuple(
        unit_rows_of(
            f"{M}in_proj.weight.{name}",
            MIXER + hf,
            (size, "hidden"),
            units="delta_key_heads",
            start="+".join(sizes[:n]) or "0",
            every="+".join(sizes),
            cut=_KEY_HEADS,
            when="delta",
        )
        for n, (name, size) in enumerate(parts)
    )


def _convolution(name: str, size: str, start: str) -> Rule:
    return rows_of(
        f"{M}conv1d.weight.{name}",
        MIXER + "conv1d.weight",
        (size, "one", "delta_conv"),
        start=start,
        of=f"2*{_KEYS}+{_VALUES}",
        cut=_VALUE_HEADS if name == "value" else _KEY_HEADS,
        when="delta",
    )


DELTA_LAYER: tuple[Rule, ...] = (
    same(M + "in_proj.layer_norm_weight", H + "input_layernorm.weight", ("hidden",), when="delta"),
    *_grouped(
        "in_proj_qkvz.weight",
        (("query", _KEY_ROWS), ("key", _KEY_ROWS), ("value", _VALUE_ROWS), ("z", _VALUE_ROWS)),
    ),
    *_grouped("in_proj_ba.weight", (("beta", "delta_values_per_key"), ("alpha", "delta_values_per_key"))),
    _convolution("query", _KEYS, "0"),
    _convolution("key", _KEYS, _KEYS),
    _convolution("value", _VALUES, f"2*{_KEYS}"),
    *(
        same(M + name, MIXER + name, ("delta_value_heads",), cut=_VALUE_HEADS, when="delta", own_dtype=True)
        for name in ("A_log", "dt_bias")
    ),
    same(M + "out_norm.weight", MIXER + "norm.weight", ("delta_value_dim",), when="delta", own_dtype=True),
    same(
        M + "out_proj.weight",
        MIXER + "out_proj.weight",
        ("hidden", _VALUES),
        cut=columns("delta_value_heads"),
        when="delta",
    ),
)
"""The norm before the mixer and the mixer."""

_MTP_H = "mtp.layers.0."
MTP: tuple[Rule, ...] = (
    same(MTP_LAYERS + "enorm.weight", "mtp.pre_fc_norm_embedding.weight", ("hidden",)),
    same(MTP_LAYERS + "hnorm.weight", "mtp.pre_fc_norm_hidden.weight", ("hidden",)),
    same(MTP_LAYERS + "eh_proj.weight", "mtp.fc.weight", ("hidden", "2*hidden"), cut=rows("hidden")),
    same(MTP_LAYERS + "final_layernorm.weight", "mtp.norm.weight", ("hidden",)),
)
"""Joining the hidden state with the next token's embedding, for the one prediction layer of the hub's checkpoints."""


def delta_decoder(rules: Sequence[Rule | Drop]) -> tuple[Rule | Drop, ...]:
    """The table of a decoder, its attention gated and in some layers only, gated delta nets in the others.

    megatron-core builds it of Transformer Engine's layers alone, where the norm before experts is a module.
    """
    table: list[Rule | Drop] = []
    for rule in rules:
        if isinstance(rule, Rule) and rule.megatron.startswith(M):
            rule = replace(rule, when=f"{rule.when} attention".strip())
        if isinstance(rule, Rule) and rule.kind == "qkv":
            rule = gated_qkv(rule.megatron, *(part.hf for part in rule.parts), width=rule.width, when=rule.when)
        if isinstance(rule, Rule) and rule.megatron == _MLP_NORM:
            table.append(replace(rule, megatron=LAYERS + "pre_mlp_layernorm.weight", when="moe"))
            rule = replace(rule, when="dense")
        table.append(rule)
    return (*table, *DELTA_LAYER)


def with_delta_mtp(table: Sequence[Rule | Drop]) -> tuple[Rule | Drop, ...]:
    """The table, with a prediction layer that holds a layer like its own under other HF names."""
    inside = (in_mtp(rule) for rule in table if isinstance(rule, Rule) and rule.in_layer and "delta" not in rule.when)
    renamed = (
        replace(rule, parts=tuple(replace(part, hf=part.hf.replace(H, _MTP_H)) for part in rule.parts))
        for rule in inside
    )
    return (*table, *renamed, *MTP)


def delta_spec(config: Fields) -> DeltaSpec:
    """Reads the `linear_` fields."""
    keys, values = config.integer("linear_num_key_heads", 16), config.integer("linear_num_value_heads", 32)
    config.check("linear_num_value_heads", values, range(keys, values + 1, keys))
    return DeltaSpec(
        num_key_heads=keys,
        num_value_heads=values,
        key_head_dim=config.integer("linear_key_head_dim", 128),
        value_head_dim=config.integer("linear_value_head_dim", 128),
        conv_kernel=config.integer("linear_conv_kernel_dim", 4),
    )
