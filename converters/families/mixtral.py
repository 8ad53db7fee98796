"""Mixtral 8x7B and 8x22B: the weights of the chosen experts sum to one."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.dense import DECODER, dense_spec
from mswift.converters.tables.layer_types import sliding_layers
from mswift.converters.tables.moe import (
    EACH,
    SPELLINGS,
    STACKED,
    H,
    experts_each,
    experts_stacked,
    moe_spec,
    router,
    with_experts,
    without_dense_mlp,
)  # fmt: skip

B = H + "block_sparse_moe."
TABLE = (
    *without_dense_mlp(DECODER),
    *router(B + "gate", when=f"moe {EACH}"),
    *router(H + "mlp.gate", when=f"moe {STACKED}"),
    *experts_each(*(B + f"experts.{{e}}.{name}.weight" for name in ("w1", "w3", "w2"))),
    *experts_stacked(H + "mlp.experts.gate_up_proj", H + "mlp.experts.down_proj"),
)


def _spec(config: Fields) -> ModelSpec:
    config.require("router_jitter_noise", 0)
    config.require("layer_types", None)
    head_dim = config.integer("head_dim", config.integer("hidden_size") // config.integer("num_attention_heads"))
    return dense_spec(
        config,
        max_positions=131072,
        num_kv_heads=8,
        norm_eps=("rms_norm_eps", 1e-5),
        layers=with_experts(config, sliding_layers(config)),
        rope=config.rope(head_dim, default_theta=1e6),
        moe=moe_spec(config, ffn="intermediate_size", normalize=True, defaults=(8, 2)),
    )


FAMILY = Family("mixtral", "MixtralForCausalLM", TABLE, _spec, SPELLINGS)
