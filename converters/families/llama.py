"""Llama 1, 2, 3, 3.1: optional biases, linear or llama3 rope scaling."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import DECODER, dense_spec


def _spec(config: Fields) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    return dense_spec(
        config,
        max_positions=2048,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
    )


FAMILY = Family("llama", "LlamaForCausalLM", DECODER, _spec)
