"""DeepSeek-V3 and -R1: latent attention, sigmoid router with a bias for the choice, multi-token prediction.

Checkpoints of the hub hold the multi-token-prediction layer, those that transformers writes do not.
"""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.mla import DECODER, deepseek_moe, mla_model
from mswift.converters.tables.moe import SPELLINGS


def _spec(config: Fields) -> ModelSpec:
    config.require("scoring_func", "sigmoid")
    config.require("topk_method", "noaux_tc")
    moe = deepseek_moe(
        config,
        groups=config.integer("n_group", 8),
        best=config.integer("topk_group", 4),
        width=2048,
        shared=1,
        scale=2.5,
        experts=(256, 8),
        score="sigmoid",
        normalize=config.flag("norm_topk_prob", True),
        correction_bias=True,
        group_score="top2",
    )
    return mla_model(
        config,
        max_positions=4096,
        first_k_dense=3,
        moe=moe,
        interleaved=config.flag("rope_interleave", True),
        mtp_layers=config.count("num_nextn_predict_layers", 1),
    )


FAMILY = Family("deepseek_v3", "DeepseekV3ForCausalLM", DECODER, _spec, SPELLINGS)
