"""Qwen2 and Qwen2.5: biases on q, k and v only."""

from mswift.converters.dense import DECODER, dense_spec
from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec


def _spec(config: Fields) -> ModelSpec:
    config.no_sliding_window(switch="use_sliding_window")
    config.take("max_window_layers")  # counts for sliding-window layers only
    config.require("use_mrope", False)
    return dense_spec(config, max_positions=32768, num_kv_heads=32, qkv_bias=True)


FAMILY = Family("qwen2", "Qwen2ForCausalLM", DECODER, _spec)
