"""What dense decoders share: their table, and the reading of the config fields they have in common."""

from typing import Any

from mswift.converters.fields import Fields
from mswift.converters.rules import LAYERS, Drop, Rule, columns, drop, gate_up, qkv, rows, same
from mswift.converters.spec import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
M = LAYERS
H = "model.layers.{l}."
Q, K, V = (H + f"self_attn.{p}_proj." for p in "qkv")

DECODER: tuple[Rule | Drop, ...] = (
    same(
        "embedding.word_embeddings.weight",
        EMBEDDING,
        ("vocab", "hidden"),
        cut=rows("vocab", uneven=True),
    ),
    same(M + "self_attention.linear_qkv.layer_norm_weight", H + "input_layernorm.weight", ("hidden",)),
    qkv(M + "self_attention.linear_qkv.weight", Q + "weight", K + "weight", V + "weight", width=("hidden",)),
    qkv(M + "self_attention.linear_qkv.bias", Q + "bias", K + "bias", V + "bias", width=(), when="qkv_bias"),
    same(M + "self_attention.q_layernorm.weight", H + "self_attn.q_norm.weight", ("head_dim",), when="qk_norm"),
    same(M + "self_attention.k_layernorm.weight", H + "self_attn.k_norm.weight", ("head_dim",), when="qk_norm"),
    same(
        M + "self_attention.linear_proj.weight",
        H + "self_attn.o_proj.weight",
        ("hidden", "heads*head_dim"),
        cut=columns("groups"),
    ),
    same(
        M + "self_attention.linear_proj.bias",
        H + "self_attn.o_proj.bias",
        ("hidden",),
        when="attention_out_bias",
    ),
    same(M + "mlp.linear_fc1.layer_norm_weight", H + "post_attention_layernorm.weight", ("hidden",)),
    gate_up(M + "mlp.linear_fc1.weight", H + "mlp.gate_proj.weight", H + "mlp.up_proj.weight", width=("hidden",)),
    gate_up(M + "mlp.linear_fc1.bias", H + "mlp.gate_proj.bias", H + "mlp.up_proj.bias", width=(), when="mlp_bias"),
    same(M + "mlp.linear_fc2.weight", H + "mlp.down_proj.weight", ("hidden", "ffn"), cut=columns("ffn")),
    same(M + "mlp.linear_fc2.bias", H + "mlp.down_proj.bias", ("hidden",), when="mlp_bias"),
    same("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
    same(
        "output_layer.weight",
        "lm_head.weight",
        ("vocab", "hidden"),
        cut=rows("vocab", uneven=True),
        when="untied",
    ),
    drop("lm_head.weight", "equal to model.embed_tokens.weight (tie_word_embeddings)", same_as=EMBEDDING, when="tied"),
    *(
        drop(name, "recomputed from the rope fields of config.json")
        for name in (
            "model.rotary_emb.inv_freq",
            *(H + f"self_attn.rotary_emb.{buffer}" for buffer in ("inv_freq", "cos_cached", "sin_cached")),
        )
    ),
)


def dense_spec(
    config: Fields,
    *,
    max_positions: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    activation: str = "silu",
    norm_eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    partial_rotary: float | None = None,
    interleaved_rotary: bool = False,
    tied: bool = False,
    **features: Any,
) -> ModelSpec:
    """Reads the fields every decoder has; the keywords are the family's defaults, `features` go to the ModelSpec.

    activation: the value of hidden_act that the family has; norm_eps: name of the field and its default.
    """
    config.require("hidden_act", activation)
    config.require("attention_dropout", 0)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", head_dim or hidden // heads)
    if "rope" not in features:
        features["rope"] = config.rope(head_dim, partial=partial_rotary, interleaved=interleaved_rotary)
    values = {
        "num_layers": config.integer("num_hidden_layers"),
        "num_kv_heads": config.integer("num_key_value_heads", num_kv_heads or heads),
        "ffn_hidden_size": config.integer("intermediate_size"),
        "vocab_size": config.integer("vocab_size"),
        "max_position_embeddings": config.integer("max_position_embeddings", max_positions),
        "norm_eps": config.number(*norm_eps),
        "tied_embeddings": config.flag("tie_word_embeddings", tied),
    } | features
    return ModelSpec(
        model_type=config.model_type, hidden_size=hidden, num_attention_heads=heads, head_dim=head_dim, **values
    )
