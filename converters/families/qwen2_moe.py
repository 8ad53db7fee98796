"""Qwen2-MoE and Qwen1.5-MoE: a shared expert behind a sigmoid gate, biases on q, k and v."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import dense_spec
from mswift.converters.tables.moe import MOE_DECODER, SPELLINGS, H, moe_spec, shared_expert, sparse_steps

TABLE = (*MOE_DECODER, *shared_expert(H + "mlp.shared_expert.", H + "mlp.shared_expert_gate.weight"))


def _spec(config: Fields) -> ModelSpec:
    config.no_sliding_window(switch="use_sliding_window")
    config.take("max_window_layers")  # counts for sliding-window layers only
    shared = config.integer("shared_expert_intermediate_size", 5632)
    return dense_spec(
        config,
        max_positions=32768,
        num_kv_heads=16,
        qkv_bias=config.flag("qkv_bias", True),
        layers=sparse_steps(config),
        moe=moe_spec(config, defaults=(60, 4, 1408), shared_ffn_hidden_size=shared, shared_gate=True),
    )


FAMILY = Family("qwen2_moe", "Qwen2MoeForCausalLM", TABLE, _spec, SPELLINGS)
