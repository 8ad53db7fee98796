"""What decoders with multi-head latent attention share (DeepSeek-V2, -V3): their table and their config fields.

megatron-core keeps the norms of such layers apart (`input_layernorm`, `pre_mlp_layernorm`), and so do its checkpoints.
"""

import math
from typing import Any

from mswift.converters.fields import Fields
from mswift.converters.rules import (
    LAYERS,
    MTP_LAYERS,
    Drop,
    Rule,
    columns,
    drop,
    experts,
    gate_up,
    in_mtp,
    rows,
    same,
)
from mswift.converters.spec import LayerSpec, MlaSpec, ModelSpec, MoeSpec, RopeSpec

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
M, P = LAYERS, MTP_LAYERS
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

X = H + "mlp."
E = X + "experts.{e}."
MLP: tuple[Rule, ...] = (
    gate_up(M + "mlp.linear_fc1.weight", X + "gate_proj.weight", X + "up_proj.weight", width=("hidden",), when="dense"),
    same(M + "mlp.linear_fc2.weight", X + "down_proj.weight", ("hidden", "ffn"), cut=columns("ffn"), when="dense"),
    same(M + "mlp.router.weight", X + "gate.weight", ("experts", "hidden"), when="moe"),
    same(
        M + "mlp.router.expert_bias",
        X + "gate.e_score_correction_bias",
        ("experts",),
        when="moe correction_bias",
        own_dtype=True,
    ),
    experts(
        gate_up(
            M + "mlp.experts.experts.linear_fc1.weight",
            E + "gate_proj.weight",
            E + "up_proj.weight",
            width=("hidden",),
            when="moe",
            ffn="moe_ffn",
        ),
        "each",
    ),
    experts(
        same(
            M + "mlp.experts.experts.linear_fc2.weight",
            E + "down_proj.weight",
            ("hidden", "moe_ffn"),
            cut=columns("moe_ffn"),
            when="moe",
        ),
        "each",
    ),
    gate_up(
        M + "mlp.shared_experts.linear_fc1.weight",
        X + "shared_experts.gate_proj.weight",
        X + "shared_experts.up_proj.weight",
        width=("hidden",),
        when="moe shared_experts",
        ffn="shared_ffn",
    ),
    same(
        M + "mlp.shared_experts.linear_fc2.weight",
        X + "shared_experts.down_proj.weight",
        ("hidden", "shared_ffn"),
        cut=columns("shared_ffn"),
        when="moe shared_experts",
    ),
)
LAYER = (*MLA_LAYER, *MLP)
ENDS: tuple[Rule | Drop, ...] = (
    same("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
    same("output_layer.weight", HEAD, ("vocab", "hidden"), cut=rows("vocab", uneven=True), when="untied"),
    drop(HEAD, f"equal to {EMBEDDING} (tie_word_embeddings)", same_as=EMBEDDING, when="tied"),
    drop(S + "rotary_emb.inv_freq", "recomputed from the rope fields of config.json"),
)

MTP: tuple[Rule | Drop, ...] = (
    same(P + "enorm.weight", H + "enorm.weight", ("hidden",)),
    same(P + "hnorm.weight", H + "hnorm.weight", ("hidden",)),
    same(P + "eh_proj.weight", H + "eh_proj.weight", ("hidden", "2*hidden"), cut=rows("hidden")),
    same(P + "final_layernorm.weight", H + "shared_head.norm.weight", ("hidden",)),
    drop(H + "embed_tokens.weight", f"equal to {EMBEDDING}", same_as=EMBEDDING, when="mtp_layer"),
    drop(H + "shared_head.head.weight", f"equal to {HEAD}", same_as=HEAD, when="mtp_layer"),
)
"""What a multi-token-prediction layer of DeepSeek-V3 has beside the decoder layer in it (`rules.in_mtp`)."""


DECODER: tuple[Rule | Drop, ...] = (
    same("embedding.word_embeddings.weight", EMBEDDING, ("vocab", "hidden"), cut=rows("vocab", uneven=True)),
    *LAYER,
    *(in_mtp(rule) for rule in LAYER),
    *MTP,
    *ENDS,
)


def mla_model(config: Fields, *, max_positions: int, moe: MoeSpec, interleaved: bool, mtp_layers: int = 0) -> ModelSpec:
    """The model of a DeepSeek config.json: `first_k_dense_replace` dense layers, then mixtures of experts."""
    config.require("hidden_act", "silu")
    config.require("attention_dropout", 0)
    config.require("moe_layer_freq", 1)
    layers, heads = config.integer("num_hidden_layers"), config.integer("num_attention_heads")
    config.require("num_key_value_heads", heads)
    mla = _mla_spec(config)
    rope = config.rope(mla.qk_rope_head_dim, interleaved=interleaved)
    dense = config.count("first_k_dense_replace", 0)
    mixture = LayerSpec(mlp="moe")
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
        layers=tuple(LayerSpec() if number < dense else mixture for number in range(layers)),
        mtp_layers=(mixture,) * mtp_layers,
        moe=moe,
        mla=mla,
    )


def moe_sizes(config: Fields) -> dict[str, Any]:
    """The fields of MoeSpec that both generations name alike."""
    width = config.integer("moe_intermediate_size")
    shared = config.count("n_shared_experts", 0)
    return {
        "num_experts": config.integer("n_routed_experts"),
        "top_k": config.integer("num_experts_per_tok"),
        "ffn_hidden_size": width,
        "scale": config.number("routed_scaling_factor", 1.0),
        "shared_ffn_hidden_size": width * shared,
    }


def _mla_spec(config: Fields) -> MlaSpec:
    """The widths of latent attention; q_lora_rank null: queries are projected directly."""
    config.require("attention_bias", False)
    mla = MlaSpec(
        q_lora_rank=None if config.take("q_lora_rank") is None else config.integer("q_lora_rank"),
        kv_lora_rank=config.integer("kv_lora_rank"),
        qk_nope_head_dim=config.integer("qk_nope_head_dim"),
        qk_rope_head_dim=config.integer("qk_rope_head_dim"),
        v_head_dim=config.integer("v_head_dim"),
    )
    config.require("qk_head_dim", mla.qk_head_dim)  # transformers 5 writes both
    config.require("head_dim", mla.qk_rope_head_dim)
    return mla


def _attention_scale(qk_head_dim: int, rope: RopeSpec) -> float | None:
    """Yarn's mscale_all_dim makes scores larger: (0.1 * mscale_all_dim * ln(factor) + 1) ** 2 (DeepSeek-V2)."""
    if rope.kind != "yarn" or not rope.mscale_all_dim or rope.factor <= 1:
        return None
    return float((0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1) ** 2 * qk_head_dim**-0.5)
