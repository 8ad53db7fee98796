"""InternLM 2 and 2.5: q, k and v fused by KV groups, as Megatron has them; names of its own."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.rules import columns, drop, gate_up, grouped_qkv, rows, same
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import M, dense_spec

H = "model.layers.{l}."
TABLE = (
    same(
        "embedding.word_embeddings.weight",
        "model.tok_embeddings.weight",
        ("vocab", "hidden"),
        cut=rows("vocab", uneven=True),
    ),
    same(M + "self_attention.linear_qkv.layer_norm_weight", H + "attention_norm.weight", ("hidden",)),
    grouped_qkv(M + "self_attention.linear_qkv.weight", H + "attention.wqkv.weight", width=("hidden",)),
    grouped_qkv(M + "self_attention.linear_qkv.bias", H + "attention.wqkv.bias", width=(), when="qkv_bias"),
    same(
        M + "self_attention.linear_proj.weight",
        H + "attention.wo.weight",
        ("hidden", "heads*head_dim"),
        cut=columns("groups"),
    ),
    same(M + "self_attention.linear_proj.bias", H + "attention.wo.bias", ("hidden",), when="attention_out_bias"),
    same(M + "mlp.linear_fc1.layer_norm_weight", H + "ffn_norm.weight", ("hidden",)),
    gate_up(M + "mlp.linear_fc1.weight", H + "feed_forward.w1.weight", H + "feed_forward.w3.weight", width=("hidden",)),
    same(M + "mlp.linear_fc2.weight", H + "feed_forward.w2.weight", ("hidden", "ffn"), cut=columns("ffn")),
    same("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
    same("output_layer.weight", "output.weight", ("vocab", "hidden"), cut=rows("vocab", uneven=True), when="untied"),
    drop("output.weight", "equal to the embedding", same_as="model.tok_embeddings.weight", when="tied"),
    drop(H + "attention.rotary_emb.inv_freq", "recomputed from the rope fields of config.json"),
)


def _spec(config: Fields) -> ModelSpec:
    bias = config.flag("bias", True)
    return dense_spec(config, max_positions=2048, qkv_bias=bias, attention_out_bias=bias)


FAMILY = Family("internlm2", "InternLM2ForCausalLM", TABLE, _spec)
