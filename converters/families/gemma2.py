"""Gemma 2: Gemma with norms on both sides of every sublayer, soft-caps, and a window in every other layer."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import SANDWICH, decoder, dense_spec
from mswift.converters.tables.layer_types import sliding_layers


def _spec(config: Fields) -> ModelSpec:
    config.require("use_bidirectional_attention", False)
    bias = config.flag("attention_bias", False)
    return dense_spec(
        config,
        max_positions=8192,
        num_kv_heads=4,
        head_dim=256,
        activation="gelu_pytorch_tanh",
        activation_fields=("hidden_act", "hidden_activation"),
        tied=True,
        qkv_bias=bias,
        attention_out_bias=bias,
        zero_centered_norm=True,
        post_norm=True,
        embedding_multiplier=config.integer("hidden_size") ** 0.5,
        rounded_embedding_multiplier=True,
        attention_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=config.optional_number("attn_logit_softcapping", 50.0),
        logit_softcap=config.optional_number("final_logit_softcapping", 30.0),
        layers=sliding_layers(config, lambda layer: layer % 2 == 0, default=4096),
    )


FAMILY = Family("gemma2", "Gemma2ForCausalLM", decoder(norms=SANDWICH), _spec)
