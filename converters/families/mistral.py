"""Mistral without an active sliding window (v0.2 and later)."""

from mswift.converters.dense import DECODER, dense_spec
from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec


def _spec(config: Fields) -> ModelSpec:
    config.no_sliding_window()
    return dense_spec(config, max_positions=131072, num_kv_heads=8)


FAMILY = Family("mistral", "MistralForCausalLM", DECODER, _spec)
