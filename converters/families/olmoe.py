"""OLMoE: many small experts, RMSNorm over the whole width of queries and of keys."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import dense_spec
from mswift.converters.tables.moe import MOE_DECODER, SPELLINGS, moe_spec, with_experts


def _spec(config: Fields) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    config.require("clip_qkv", None)
    return dense_spec(
        config,
        max_positions=4096,
        norm_eps=("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        attention_out_bias=bias,
        qk_norm="width",
        layers=with_experts(config),
        moe=moe_spec(config, ffn="intermediate_size", defaults=(64, 8)),
    )


FAMILY = Family("olmoe", "OlmoeForCausalLM", MOE_DECODER, _spec, SPELLINGS)
