"""What the generations of Gemma have alike."""

from typing import Any

from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import dense_spec

GELU = "gelu_pytorch_tanh"


def gemma_spec(config: Fields, *, activation_fields: tuple[str, ...], num_kv_heads: int, **features: Any) -> ModelSpec:
    """Norms of 1 + w, embeddings times the root of the width, GeGLU with the tanh approximation, tied embeddings.

    The keywords are as `dense_spec` has them.
    """
    config.require("use_bidirectional_attention", False)
    bias = config.flag("attention_bias", False)
    return dense_spec(
        config,
        num_kv_heads=num_kv_heads,
        head_dim=256,
        activation=GELU,
        activation_fields=activation_fields,
        tied=True,
        qkv_bias=bias,
        attention_out_bias=bias,
        zero_centered_norm=True,
        embedding_multiplier=config.integer("hidden_size") ** 0.5,
        rounded_embedding_multiplier=True,
        **features,
    )


def sandwich_gemma_spec(config: Fields, **features: Any) -> ModelSpec:
    """Gemma 2 and 3: norms on both sides of every sublayer, and a scale of attention of their own."""
    return gemma_spec(
        config,
        activation_fields=("hidden_act", "hidden_activation"),
        num_kv_heads=4,
        post_norm=True,
        attention_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        **features,
    )
