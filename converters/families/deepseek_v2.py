"""DeepSeek-V2, -V2-Lite and -V2.5: latent attention, softmax router (limited to the best groups in the large ones)."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec
from mswift.converters.tables.mla import DECODER, deepseek_moe, mla_model
from mswift.converters.tables.moe import SPELLINGS


def _spec(config: Fields) -> ModelSpec:
    config.require("mlp_bias", False)
    config.require("scoring_func", "softmax")
    config.require("norm_topk_prob", False)  # transformers ignores it, DeepSeek's own class does not
    groups, best = config.take("n_group"), config.take("topk_group")  # no part of the greedy choice
    if config.one_of("topk_method", ("greedy", "group_limited_greedy")) == "greedy":
        groups = best = 1
    else:
        groups, best = config.integer("n_group"), config.integer("topk_group")
    moe = deepseek_moe(config, groups=groups, best=best, width=1407, shared=2, experts=(64, None))
    return mla_model(config, max_positions=2048, moe=moe, interleaved=True)


FAMILY = Family("deepseek_v2", "DeepseekV2ForCausalLM", DECODER, _spec, SPELLINGS)
