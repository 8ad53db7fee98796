"""Qwen2 and Qwen2.5: biases on q, k and v only; a sliding window in the upper layers if it is switched on."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import DECODER, dense_spec
from mswift.converters.tables.layer_types import sliding_upper_layers


def _spec(config: Fields) -> ModelSpec:
    layers = sliding_upper_layers(config)
    config.require("use_mrope", False)
    return dense_spec(config, max_positions=32768, num_kv_heads=32, qkv_bias=True, layers=layers)


FAMILY = Family("qwen2", "Qwen2ForCausalLM", DECODER, _spec)
