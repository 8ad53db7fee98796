"""Gemma 3, text only: like Gemma 2 with head norms for soft-caps, and another rope in layers with a window."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import LayerSpec, ModelSpec
from mswift.converters.tables.dense import SANDWICH, decoder
from mswift.converters.tables.gemma import sandwich_gemma_spec
from mswift.converters.tables.layer_types import ropes_of_layer_types, sliding, window


def _spec(config: Fields) -> ModelSpec:
    config.require("attn_logit_softcapping", None)
    every = config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", 6))
    slides, width = sliding(config, lambda layer: (layer + 1) % every != 0), window(config, 4096)
    rope, local = ropes_of_layer_types(config, ("rope_theta", 1e6), ("rope_local_base_freq", 1e4))
    return sandwich_gemma_spec(
        config,
        max_positions=131072,
        qk_norm="head",
        logit_softcap=config.optional_number("final_logit_softcapping"),
        rope=rope,
        other_ropes=(local,),
        layers=tuple(LayerSpec(window=width if slide else None, rope=int(slide)) for slide in slides),
    )


FAMILY = Family("gemma3_text", "Gemma3ForCausalLM", decoder(norms=SANDWICH), _spec)
