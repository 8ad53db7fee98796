"""gpt-oss: experts with biases and a clamped activation, a learnt logit per head in the softmax, windows, YaRN."""

from dataclasses import replace

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.rules import rows, same
from mswift.converters.spec import ModelSpec, RopeSpec
from mswift.converters.tables.dense import DECODER, dense_spec
from mswift.converters.tables.layer_types import sliding_layers
from mswift.converters.tables.moe import H, M, experts_with_biases, moe_spec, router, with_experts, without_dense_mlp

TABLE = (
    *without_dense_mlp(DECODER),
    same(M + "self_attention.core_attention.softmax_offset", H + "self_attn.sinks", ("heads",), cut=rows("groups")),
    *router(H + "mlp.router"),
    *experts_with_biases(H + "mlp.experts."),
)
ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


def _rope(config: Fields, head_dim: int) -> RopeSpec:
    """YaRN, also where config.json does not say so."""
    if config.take("rope_parameters") or config.take("rope_scaling"):
        return config.rope(head_dim, default_theta=150000.0)
    return config.rope_of(ROPE, "rope_scaling", theta=config.number("rope_theta", 150000.0))


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
        rope=_rope(config, head_dim),
        attention_sinks=True,
        layers=with_experts(config, layers),
        moe=moe,
    )
    return replace(spec, activation="quick_gelu", swiglu_limit=config.number("swiglu_limit", 7.0), glu_offset=1.0)


FAMILY = Family("gpt_oss", "GptOssForCausalLM", TABLE, _spec)
