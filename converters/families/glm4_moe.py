"""GLM-4.5 and 4.6: sigmoid router with a bias for the choice, shared experts, multi-token prediction.

Checkpoints of the hub hold the multi-token-prediction layer, those that transformers writes do not.
"""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import LayerSpec, ModelSpec
from mswift.converters.tables.dense import dense_spec
from mswift.converters.tables.moe import MOE_DECODER, SPELLINGS, H, moe_spec, shared_expert, with_experts
from mswift.converters.tables.mtp import with_mtp

TABLE = with_mtp((*MOE_DECODER, *shared_expert(H + "mlp.shared_experts.")))


def _spec(config: Fields) -> ModelSpec:
    dense = config.count("first_k_dense_replace", 1)
    moe = moe_spec(
        config,
        num_experts=("n_routed_experts", "num_local_experts"),
        score="sigmoid",
        normalize=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 1.0),
        num_groups=config.integer("n_group", 1),
        topk_groups=config.integer("topk_group", 1),
        group_score="top2",
        correction_bias=True,
        shared_ffn_hidden_size=config.integer("moe_intermediate_size", 1408) * config.integer("n_shared_experts", 1),
        defaults=(128, 8, 1408),
    )
    return dense_spec(
        config,
        max_positions=131072,
        num_kv_heads=8,
        norm_eps=("rms_norm_eps", 1e-5),
        partial_rotary=0.5,
        qkv_bias=config.flag("attention_bias", False),
        qk_norm="head" if config.flag("use_qk_norm", False) else "none",
        layers=with_experts(config, (), lambda layer: layer >= dense),
        mtp_layers=(LayerSpec(mlp="moe"),) * config.count("num_nextn_predict_layers", 1),
        moe=moe,
    )


FAMILY = Family("glm4_moe", "Glm4MoeForCausalLM", TABLE, _spec, SPELLINGS)
