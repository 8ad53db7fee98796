"""What dense decoders share: their table, and the reading of the config fields they have in common."""

from mswift.converters.fields import Fields
from mswift.converters.rules import Drop, Rule, columns, drop, gate_up, qkv, rows, same
from mswift.converters.spec import ModelSpec

M = "decoder.layers."
H = "model.layers.{l}."
Q, K, V = (H + f"self_attn.{p}_proj." for p in "qkv")

DECODER: tuple[Rule | Drop, ...] = (
    same(
        "embedding.word_embeddings.weight",
        "model.embed_tokens.weight",
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
    drop(H + "self_attn.rotary_emb.inv_freq", "recomputed from the rope fields of config.json"),
)


def dense_spec(
    config: Fields,
    *,
    max_positions: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    attention_out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelSpec:
    """Reads the fields every dense decoder has; the keywords are the family's defaults and features."""
    config.require("hidden_act", "silu")
    config.require("attention_dropout", 0)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    return ModelSpec(
        model_type=config.model_type,
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_kv_heads=config.integer("num_key_value_heads", num_kv_heads or heads),
        head_dim=config.integer("head_dim", head_dim or hidden // heads),
        ffn_hidden_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_position_embeddings", max_positions),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=config.rope(),
        tied_embeddings=config.flag("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        attention_out_bias=attention_out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )
