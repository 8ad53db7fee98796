"""Granite 3: Llama with four multipliers."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import DECODER, dense_spec


def _spec(config: Fields) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    return dense_spec(
        config,
        max_positions=2048,
        dropouts=("attention_dropout",),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
        attention_scale=config.number("attention_multiplier", 1.0),
        embedding_multiplier=config.number("embedding_multiplier", 1.0),
        residual_multiplier=config.number("residual_multiplier", 1.0),
        logit_divisor=config.number("logits_scaling", 1.0),
    )


FAMILY = Family("granite", "GraniteForCausalLM", DECODER, _spec)
