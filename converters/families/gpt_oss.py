"""gpt-oss: experts with biases and a clamped activation, a learnt logit per head in the softmax, windows, YaRN."""

from dataclasses import replace

from mswift.converters.dense import DECODER, dense_spec
from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.layer_types import sliding_layers
from mswift.converters.moe_tables import FC1, FC2, H, M, moe_spec, router, with_experts, without_dense_mlp
from mswift.converters.rules import columns, experts, interleaved_gate_up, rows, same
from mswift.converters.spec import ModelSpec

E = H + "mlp.experts."
BIAS1, BIAS2 = (key.removesuffix("weight") + "bias" for key in (FC1, FC2))
SINKS = M + "self_attention.core_attention.softmax_offset"
_UP, _UP_BIAS = (
    interleaved_gate_up(key, E + name, width=width, when="moe", ffn="moe_ffn")
    for key, name, width in ((FC1, "gate_up_proj", ("hidden",)), (BIAS1, "gate_up_proj_bias", ()))
)
_DOWN = same(FC2, E + "down_proj", ("hidden", "moe_ffn"), cut=columns("moe_ffn"), when="moe")
TABLE = (
    *without_dense_mlp(DECODER),
    same(SINKS, H + "self_attn.sinks", ("heads",), cut=rows("groups")),
    *router(H + "mlp.router"),
    *(experts(rule, "stacked", transposed=True) for rule in (_UP, _DOWN)),
    *(experts(rule, "stacked") for rule in (_UP_BIAS, same(BIAS2, E + "down_proj_bias", ("hidden",), when="moe"))),
)


def _spec(config: Fields) -> ModelSpec:
    bias = config.flag("attention_bias", True)
    moe = moe_spec(
        config, ffn="intermediate_size", score="topk_softmax", normalize=True, router_bias=True, expert_bias=True,
        defaults=(128, 4),
    )  # fmt: skip
    config.require("experts_per_token", moe.top_k)  # said twice
    config.take("initial_context_length")  # rope_scaling.original_max_position_embeddings is what counts
    config.require("swiglu_alpha", 1.702)
    if not (config.take("rope_parameters") or config.take("rope_scaling")):
        raise config.refused("rope_scaling", "is absent, where transformers takes yarn; write it out")
    layers = sliding_layers(config, lambda layer: layer % 2 == 0, default=128)
    head_dim = config.integer("head_dim", 64)
    spec = dense_spec(
        config,
        max_positions=131072,
        num_kv_heads=8,
        head_dim=head_dim,
        norm_eps=("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        attention_out_bias=bias,
        rope=config.rope(head_dim, default_theta=150000.0),
        attention_sinks=True,
        layers=with_experts(config, layers),
        moe=moe,
    )
    return replace(spec, activation="quick_gelu", swiglu_limit=config.number("swiglu_limit", 7.0), glu_offset=1.0)


FAMILY = Family("gpt_oss", "GptOssForCausalLM", TABLE, _spec)
