"""Qwen3: RMSNorm on each query and key head, no bias unless attention_bias."""

from mswift.converters.dense import DECODER, dense_spec
from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec


def _spec(config: Fields) -> ModelSpec:
    config.no_sliding_window(switch="use_sliding_window")
    config.take("max_window_layers")  # counts for sliding-window layers only
    bias = config.flag("attention_bias", False)
    return dense_spec(
        config,
        max_positions=32768,
        num_kv_heads=32,
        head_dim=128,
        qkv_bias=bias,
        attention_out_bias=bias,
        qk_norm="head",
    )


FAMILY = Family("qwen3", "Qwen3ForCausalLM", DECODER, _spec)
