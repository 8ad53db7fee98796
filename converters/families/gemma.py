"""Gemma: norms of 1 + w, embeddings times the root of the width, GeGLU with the tanh approximation.

The first releases say "gelu" and mean the approximation; transformers reads them so.
"""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import DECODER
from mswift.converters.tables.gemma import GELU, gemma_spec


def _spec(config: Fields) -> ModelSpec:
    config.one_of("hidden_act", (GELU, "gelu"))
    return gemma_spec(config, activation_fields=("hidden_activation",), num_kv_heads=16, max_positions=8192)


FAMILY = Family("gemma", "GemmaForCausalLM", DECODER, _spec)
