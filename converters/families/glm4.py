"""GLM-4-0414: GLM with norms on both sides of every sublayer."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import Norms
from mswift.converters.tables.glm import glm_decoder, glm_spec

NORMS = Norms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


def _spec(config: Fields) -> ModelSpec:
    return glm_spec(config, post_norm=True)


FAMILY = Family("glm4", "Glm4ForCausalLM", glm_decoder(NORMS), _spec)
