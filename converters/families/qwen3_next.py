"""Qwen3-Next: gated delta nets, every fourth layer gated attention; experts behind each."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import LayerSpec, ModelSpec
from mswift.converters.tables.delta import delta_decoder, delta_spec, with_delta_mtp
from mswift.converters.tables.dense import dense_spec
from mswift.converters.tables.moe import MOE_DECODER, SPELLINGS, H, moe_spec, shared_expert, sparse_steps

SHARED_EXPERT = shared_expert(H + "mlp.shared_expert.", H + "mlp.shared_expert_gate.weight")
TABLE = with_delta_mtp((*delta_decoder(MOE_DECODER), *SHARED_EXPERT))


def _layers(config: Fields) -> tuple[LayerSpec, ...]:
    """Mixers by `layer_types` or `full_attention_interval`, MLPs by `decoder_sparse_step`."""
    count, every = config.integer("num_hidden_layers"), config.integer("full_attention_interval", 4)
    default = ["full_attention" if (n + 1) % every == 0 else "linear_attention" for n in range(count)]
    kinds = config.take("layer_types", default)
    for kind in kinds:
        config.check("layer_types", kind, ("full_attention", "linear_attention"))
    return tuple(
        LayerSpec("attention", layer.mlp) if kind == "full_attention" else LayerSpec("delta", layer.mlp, rope=None)
        for kind, layer in zip(kinds, sparse_steps(config), strict=True)
    )


def _spec(config: Fields) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    shared = config.integer("shared_expert_intermediate_size", 512)
    normalize = config.flag("norm_topk_prob", True)
    return dense_spec(
        config,
        max_positions=32768,
        num_kv_heads=2,
        head_dim=256,
        partial_rotary=0.25,
        qkv_bias=bias,
        attention_out_bias=bias,
        qk_norm="head",
        zero_centered_norm=True,
        attention_gate=True,
        layers=_layers(config),
        moe=moe_spec(
            config,
            normalize=normalize,
            defaults=(512, 10, 512),
            shared_ffn_hidden_size=shared,
            shared_gate=True,
        ),
        delta=delta_spec(config),
    )


FAMILY = Family(
    "qwen3_next", "Qwen3NextForCausalLM", TABLE, _spec, SPELLINGS, optional_mtp_layers=(LayerSpec("attention", "moe"),)
)
