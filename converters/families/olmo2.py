"""OLMo 2: norms behind the sublayers only, and over the whole width of q and of k."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import Norms, decoder, dense_spec

NORMS = Norms("", "post_attention_layernorm", "", "post_feedforward_layernorm")


def _spec(config: Fields) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    return dense_spec(
        config,
        max_positions=2048,
        norm_eps=("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        attention_out_bias=bias,
        qk_norm="width",
        pre_norm=False,
        post_norm=True,
    )


FAMILY = Family("olmo2", "Olmo2ForCausalLM", decoder(norms=NORMS), _spec)
