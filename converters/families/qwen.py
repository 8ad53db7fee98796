"""Qwen-7B (the first Qwen): fused c_attn with a bias, c_proj; of the MLP, w2 is the gate and w1 is up.

Beyond seq_length its code changes the rope and scales queries, in inference only: such lengths are refused.
"""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.rules import columns, drop, fused_qkv, gate_up, rows, same
from mswift.converters.spec import ModelSpec, RopeSpec
from mswift.converters.tables.dense import M, dense_spec

H = "transformer.h.{l}."
VOCAB = ("vocab", "hidden")
TABLE = (
    same("embedding.word_embeddings.weight", "transformer.wte.weight", VOCAB, cut=rows("vocab", uneven=True)),
    same(M + "self_attention.linear_qkv.layer_norm_weight", H + "ln_1.weight", ("hidden",)),
    fused_qkv(M + "self_attention.linear_qkv.weight", H + "attn.c_attn.weight", width=("hidden",)),
    fused_qkv(M + "self_attention.linear_qkv.bias", H + "attn.c_attn.bias", width=()),
    same(
        M + "self_attention.linear_proj.weight",
        H + "attn.c_proj.weight",
        ("hidden", "heads*head_dim"),
        cut=columns("groups"),
    ),
    same(M + "mlp.linear_fc1.layer_norm_weight", H + "ln_2.weight", ("hidden",)),
    gate_up(M + "mlp.linear_fc1.weight", H + "mlp.w2.weight", H + "mlp.w1.weight", width=("hidden",)),
    same(M + "mlp.linear_fc2.weight", H + "mlp.c_proj.weight", ("hidden", "ffn"), cut=columns("ffn")),
    same("decoder.final_layernorm.weight", "transformer.ln_f.weight", ("hidden",)),
    same("output_layer.weight", "lm_head.weight", VOCAB, cut=rows("vocab", uneven=True)),
    drop("transformer.rotary_emb.inv_freq", "recomputed from the rope fields of config.json"),
)
FIXED = {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True, "tie_word_embeddings": False}
RUNTIME = ("bf16", "fp16", "fp32", "onnx_safe", "softmax_in_fp32", "use_cache_kernel", "use_cache_quantization",
           "use_flash_attn", "use_dynamic_ntk", "use_logn_attn")  # fmt: skip


def _spec(config: Fields) -> ModelSpec:
    for field, value in FIXED.items():
        config.require(field, value)
    for field in RUNTIME:
        config.take(field)
    rope = RopeSpec(
        config.number("rotary_emb_base", 10000.0),
        "dynamic",
        original_max_position_embeddings=config.integer("seq_length", 8192),
    )
    return dense_spec(
        config,
        max_positions=8192,
        head_dim=config.integer("kv_channels", 128),
        norm_eps=("layer_norm_epsilon", 1e-6),
        dropouts=("attn_dropout_prob", "emb_dropout_prob"),
        qkv_bias=True,
        rope=rope,
        ffn_hidden_size=config.even_half("intermediate_size"),
    )


FAMILY = Family("qwen", "QWenLMHeadModel", TABLE, _spec)
