"""Gemma 2: Gemma with norms on both sides of every sublayer, soft-caps, and a window in every other layer."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import SANDWICH, decoder
from mswift.converters.tables.gemma import sandwich_gemma_spec
from mswift.converters.tables.layer_types import sliding_layers


def _spec(config: Fields) -> ModelSpec:
    return sandwich_gemma_spec(
        config,
        max_positions=8192,
        attention_softcap=config.optional_number("attn_logit_softcapping", 50.0),
        logit_softcap=config.optional_number("final_logit_softcapping", 30.0),
        layers=sliding_layers(config, lambda layer: layer % 2 == 0, default=4096),
    )


FAMILY = Family("gemma2", "Gemma2ForCausalLM", decoder(norms=SANDWICH), _spec)
