"""Qwen3: RMSNorm on each query and key head, no bias unless attention_bias; windows as in Qwen2."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import DECODER, dense_spec
from mswift.converters.tables.layer_types import sliding_upper_layers


def _spec(config: Fields) -> ModelSpec:
    layers = sliding_upper_layers(config)
    bias = config.flag("attention_bias", False)
    return dense_spec(
        config,
        max_positions=32768,
        num_kv_heads=32,
        head_dim=128,
        qkv_bias=bias,
        attention_out_bias=bias,
        qk_norm="head",
        layers=layers,
    )


FAMILY = Family("qwen3", "Qwen3ForCausalLM", DECODER, _spec)
