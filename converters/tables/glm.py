"""What GLM-4-9B and GLM-4-0414 have alike."""

from typing import Any

from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import ATTENTION, DOWN, FUSED_UP, Norms, Table, decoder, dense_spec


def glm_decoder(norms: Norms | None = None) -> Table:
    """Linears of attention apart, gate and up in one."""
    return decoder(norms=norms, attention=ATTENTION, mlp=(*FUSED_UP, *DOWN))


def glm_spec(config: Fields, **features: Any) -> ModelSpec:
    """Half of each head rotated, neighbours against each other; `features` go to the ModelSpec."""
    return dense_spec(
        config,
        max_positions=131072,
        num_kv_heads=2,
        head_dim=128,
        norm_eps=("rms_norm_eps", 1.5625e-7),
        partial_rotary=0.5,
        interleaved_rotary=True,
        qkv_bias=config.flag("attention_bias", True),
        **features,
    )
