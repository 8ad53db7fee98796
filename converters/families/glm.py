"""GLM-4-9B(-chat): half of each head rotated, neighbours against each other; fused gate and up."""

from mswift.converters.family import Family
from mswift.converters.tables.glm import glm_decoder, glm_spec

FAMILY = Family("glm", "GlmForCausalLM", glm_decoder(), glm_spec)
