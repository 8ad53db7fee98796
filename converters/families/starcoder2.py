"""StarCoder 2: LayerNorm, an MLP without a gate, biases everywhere, a sliding window in all layers."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.rules import columns, rows, same
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import ATTENTION, H, M, decoder, dense_spec
from mswift.converters.tables.layer_types import sliding_layers

MLP = (
    same(M + "mlp.linear_fc1.weight", H + "mlp.c_fc.weight", ("ffn", "hidden"), cut=rows("ffn")),
    same(M + "mlp.linear_fc1.bias", H + "mlp.c_fc.bias", ("ffn",), cut=rows("ffn"), when="mlp_bias"),
    same(M + "mlp.linear_fc2.weight", H + "mlp.c_proj.weight", ("hidden", "ffn"), cut=columns("ffn")),
    same(M + "mlp.linear_fc2.bias", H + "mlp.c_proj.bias", ("hidden",), when="mlp_bias"),
)
GELU = "gelu_pytorch_tanh"
FIXED = {
    "mlp_type": "default", "norm_type": "layer_norm", "scale_attn_weights": True,
}  # fmt: skip
UNREAD = (
    "activation_function",
    "layer_norm_epsilon",
    "attention_softmax_in_fp32",
    "scale_attention_softmax_in_fp32",
)  # by transformers


def _spec(config: Fields) -> ModelSpec:
    for field, value in FIXED.items():
        config.require(field, value)
    for field in UNREAD:
        config.take(field)
    bias = config.flag("use_bias", True)
    return dense_spec(
        config,
        max_positions=4096,
        num_kv_heads=2,
        activation=GELU,
        dropouts=("attention_dropout", "residual_dropout", "embedding_dropout"),
        norm_eps=("norm_epsilon", 1e-5),
        tied=True,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        norm="layer",
        gated=False,
        layers=sliding_layers(config),
    )


FAMILY = Family("starcoder2", "Starcoder2ForCausalLM", decoder(attention=ATTENTION, mlp=MLP), _spec)
