"""What decoders with multi-head latent attention share (DeepSeek-V2, -V3): their table and their config fields.

megatron-core keeps the norms of such layers apart (`input_layernorm`, `pre_mlp_layernorm`), and so do its checkpoints.
"""

import math
from typing import Any

from mswift.converters.fields import Fields
from mswift.converters.rule import LAYERS, Drop, Rule
from mswift.converters.rules import columns, rows, same
from mswift.converters.spec import LayerSpec, MlaSpec, ModelSpec, MoeSpec, RopeSpec
from mswift.converters.tables.moe import MOE_DECODER, moe_spec, shared_expert
from mswift.converters.tables.mtp import with_mtp

M = LAYERS
A = M + "self_attention."
H = "model.layers.{l}."
S = H + "self_attn."

MLA_LAYER: tuple[Rule, ...] = (
    same(M + "input_layernorm.weight", H + "input_layernorm.weight", ("hidden",)),
    same(
        A + "linear_q_proj.weight", S + "q_proj.weight", ("heads*qk_dim", "hidden"), cut=rows("heads"), when="q_direct"
    ),
    same(A + "linear_q_down_proj.weight", S + "q_a_proj.weight", ("q_rank", "hidden"), when="q_lora"),
    same(A + "q_layernorm.weight", S + "q_a_layernorm.weight", ("q_rank",), when="q_lora"),
    same(
        A + "linear_q_up_proj.weight",
        S + "q_b_proj.weight",
        ("heads*qk_dim", "q_rank"),
        cut=rows("heads"),
        when="q_lora",
    ),
    same(A + "linear_kv_down_proj.weight", S + "kv_a_proj_with_mqa.weight", ("kv_rank+rope_dim", "hidden")),
    same(A + "kv_layernorm.weight", S + "kv_a_layernorm.weight", ("kv_rank",)),
    same(A + "linear_kv_up_proj.weight", S + "kv_b_proj.weight", ("heads*kv_up_dim", "kv_rank"), cut=rows("heads")),
    same(A + "linear_proj.weight", S + "o_proj.weight", ("hidden", "heads*v_dim"), cut=columns("heads")),
    same(M + "pre_mlp_layernorm.weight", H + "post_attention_layernorm.weight", ("hidden",)),
)
"""Attention and the two norms of a layer; the up-projections are cut between heads, the down-projections not at all."""


def _is_kept(rule: Rule | Drop) -> bool:
    """Whether a rule of other decoders holds here: embedding, output, MLPs and experts."""
    return isinstance(rule, Drop) or not (".self_attention." in rule.megatron or "layer_norm" in rule.megatron)


_KEPT = tuple(rule for rule in MOE_DECODER if _is_kept(rule))
_OUTSIDE = tuple(rule for rule in _KEPT if isinstance(rule, Drop) or not rule.in_layer)
LAYER: tuple[Rule, ...] = (
    *MLA_LAYER,
    *(rule for rule in _KEPT if isinstance(rule, Rule) and rule.in_layer),
    *shared_expert(H + "mlp.shared_experts."),
)
DECODER = with_mtp((_OUTSIDE[0], *LAYER, *_OUTSIDE[1:]))  # the embedding comes first


def mla_model(
    config: Fields,
    *,
    max_positions: int,
    moe: MoeSpec,
    interleaved: bool,
    first_k_dense: int = 0,
    mtp_layers: int = 0,
) -> ModelSpec:
    """The model of a DeepSeek config.json: `first_k_dense_replace` dense layers, then mixtures of experts.

    max_positions, first_k_dense: the family's defaults of max_position_embeddings and first_k_dense_replace.
    """
    config.require("hidden_act", "silu")
    config.require("attention_dropout", 0)
    config.require("moe_layer_freq", 1)
    layers, heads = config.integer("num_hidden_layers"), config.integer("num_attention_heads")
    config.require("num_key_value_heads", heads)
    mla = _mla_spec(config)
    rope = config.rope(mla.qk_rope_head_dim, interleaved=interleaved)
    dense = config.count("first_k_dense_replace", first_k_dense)
    mixture = LayerSpec(mlp="moe")
    kinds = tuple(LayerSpec() if number < dense else mixture for number in range(layers))
    return ModelSpec(
        model_type=config.model_type,
        num_layers=layers,
        hidden_size=config.integer("hidden_size"),
        num_attention_heads=heads,
        num_kv_heads=heads,
        head_dim=mla.qk_head_dim,
        ffn_hidden_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_position_embeddings", max_positions),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=rope,
        tied_embeddings=config.flag("tie_word_embeddings", False),
        attention_scale=_attention_scale(mla.qk_head_dim, rope),
        layers=kinds,
        mtp_layers=(kinds[-1],) * mtp_layers,
        moe=moe if mixture in kinds else None,
        mla=mla,
    )


def deepseek_moe(
    config: Fields,
    *,
    groups: int,
    best: int,
    width: int,
    shared: int,
    scale: float = 1.0,
    experts: tuple[int | None, int | None] = (None, None),
    **features: Any,
) -> MoeSpec:
    """The mixture of experts; tokens choose among the `best` of `groups` groups of experts.

    width, shared, scale, experts: the family's defaults of moe_intermediate_size, n_shared_experts,
    routed_scaling_factor and of (n_routed_experts, num_experts_per_tok).
    """
    return moe_spec(
        config,
        num_experts=("n_routed_experts", "num_local_experts"),
        defaults=(*experts, width),
        scale=config.number("routed_scaling_factor", scale),
        num_groups=groups,
        topk_groups=best,
        shared_ffn_hidden_size=config.integer("moe_intermediate_size", width)
        * config.count("n_shared_experts", shared),
        **features,
    )


def _mla_spec(config: Fields) -> MlaSpec:
    """The widths of latent attention; q_lora_rank null: queries are projected directly."""
    config.require("attention_bias", False)
    mla = MlaSpec(
        q_lora_rank=config.optional_integer("q_lora_rank", 1536),
        kv_lora_rank=config.integer("kv_lora_rank", 512),
        qk_nope_head_dim=config.integer("qk_nope_head_dim", 128),
        qk_rope_head_dim=config.integer("qk_rope_head_dim", 64),
        v_head_dim=config.integer("v_head_dim", 128),
    )
    config.require("qk_head_dim", mla.qk_head_dim)  # transformers 5 writes both
    config.require("head_dim", mla.qk_rope_head_dim)
    return mla


def _attention_scale(qk_head_dim: int, rope: RopeSpec) -> float | None:
    """Yarn's mscale_all_dim makes scores larger: (0.1 * mscale_all_dim * ln(factor) + 1) ** 2 (DeepSeek-V2)."""
    if rope.kind != "yarn" or not rope.mscale_all_dim or rope.factor <= 1:
        return None
    return float((0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1) ** 2 * qk_head_dim**-0.5)
