"""Mistral: a sliding window in all layers (v0.1) or in none."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import DECODER, dense_spec
from mswift.converters.tables.layer_types import sliding_layers


def _spec(config: Fields) -> ModelSpec:
    config.require("layer_types", None)
    layers = sliding_layers(config, default=4096)
    return dense_spec(config, max_positions=131072, num_kv_heads=8, layers=layers)


FAMILY = Family("mistral", "MistralForCausalLM", DECODER, _spec)
