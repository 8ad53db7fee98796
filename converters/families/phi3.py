"""Phi-3, Phi-3.5 and Phi-4(-mini): fused q, k, v and gate, up; LongRoPE; part of a head rotated in Phi-4-mini."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.rules import fused_qkv
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import ATTENTION_OUT, DOWN, FUSED_UP, H, M, decoder, dense_spec
from mswift.converters.tables.layer_types import sliding_layers

QKV = fused_qkv(M + "self_attention.linear_qkv.weight", H + "self_attn.qkv_proj.weight", width=("hidden",))
TABLE = decoder(attention=(QKV, *ATTENTION_OUT), mlp=(*FUSED_UP, *DOWN))
WITHOUT = {"embd_pdrop": 0, "resid_pdrop": 0, "full_attn_mod": 1, "interpolate_factor": 1}
NO_BIAS = ("attention_bias", "mlp_bias", "lm_head_bias")


def _spec(config: Fields) -> ModelSpec:
    for field, value in {**WITHOUT, **dict.fromkeys(NO_BIAS, False)}.items():
        config.require(field, value)
    config.take("original_max_position_embeddings")  # of LongRoPE, also where there is none
    layers = sliding_layers(config)
    return dense_spec(config, max_positions=4096, norm_eps=("rms_norm_eps", 1e-5), partial_rotary=1.0, layers=layers)


FAMILY = Family("phi3", "Phi3ForCausalLM", TABLE, _spec)
