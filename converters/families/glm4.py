"""GLM-4-0414: GLM with norms on both sides of every sublayer."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import ATTENTION, DOWN, FUSED_UP, Norms, decoder, dense_spec

NORMS = Norms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


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
        post_norm=True,
    )


FAMILY = Family("glm4", "Glm4ForCausalLM", decoder(norms=NORMS, attention=ATTENTION, mlp=(*FUSED_UP, *DOWN)), _spec)
