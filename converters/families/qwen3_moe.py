"""Qwen3-MoE: experts without a shared one, RMSNorm on each query and key head."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import dense_spec
from mswift.converters.tables.moe import MOE_DECODER, SPELLINGS, moe_spec, sparse_steps


def _spec(config: Fields) -> ModelSpec:
    config.no_sliding_window(switch="use_sliding_window")
    config.take("max_window_layers")  # counts for sliding-window layers only
    bias = config.flag("attention_bias", False)
    return dense_spec(
        config,
        max_positions=32768,
        num_kv_heads=4,
        qkv_bias=bias,
        attention_out_bias=bias,
        qk_norm="head",
        layers=sparse_steps(config),
        moe=moe_spec(config, defaults=(128, 8, 768)),
    )


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", MOE_DECODER, _spec, SPELLINGS)
