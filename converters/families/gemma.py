"""Gemma: norms of 1 + w, embeddings times the root of the width, GeGLU with the tanh approximation.

The first releases say "gelu" and mean the approximation; transformers reads them so.
"""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import DECODER, dense_spec

GELU = "gelu_pytorch_tanh"


def _spec(config: Fields) -> ModelSpec:
    config.one_of("hidden_act", (GELU, "gelu"))
    config.require("use_bidirectional_attention", False)
    bias = config.flag("attention_bias", False)
    return dense_spec(
        config,
        max_positions=8192,
        num_kv_heads=16,
        head_dim=256,
        activation=GELU,
        activation_fields=("hidden_activation",),
        tied=True,
        qkv_bias=bias,
        attention_out_bias=bias,
        zero_centered_norm=True,
        embedding_multiplier=config.integer("hidden_size") ** 0.5,
        rounded_embedding_multiplier=True,
    )


FAMILY = Family("gemma", "GemmaForCausalLM", DECODER, _spec)
