"""InternLM 3: Llama with a switch of its own for the biases of q, k and v."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import DECODER, dense_spec


def _spec(config: Fields) -> ModelSpec:
    bias = config.flag("bias", False)
    return dense_spec(
        config,
        max_positions=32768,
        qkv_bias=config.flag("qkv_bias", False),
        attention_out_bias=bias,
        mlp_bias=bias,
    )


FAMILY = Family("internlm3", "InternLM3ForCausalLM", DECODER, _spec)
