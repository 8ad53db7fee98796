"""GLM-4-9B(-chat): half of each head rotated, neighbours against each other; fused gate and up."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import ATTENTION, DOWN, FUSED_UP, decoder, dense_spec


def _spec(config: Fields) -> ModelSpec:
    return dense_spec(
        config,
        max_positions=131072,
        num_kv_heads=2,
        head_dim=128,
        norm_eps=("rms_norm_eps", 1.5625e-7),
        partial_rotary=0.5,
        interleaved_rotary=True,
        qkv_bias=config.flag("attention_bias", True),
    )


FAMILY = Family("glm", "GlmForCausalLM", decoder(attention=ATTENTION, mlp=(*FUSED_UP, *DOWN)), _spec)
