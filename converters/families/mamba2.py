"""Mamba-2 (Dao and Gu 2024) as transformers names it: mixers only, no attention, no MLP."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import LayerSpec, ModelSpec, RopeSpec
from mswift.converters.tables.mamba import AROUND, MAMBA_LAYER, mamba_spec


def _spec(config: Fields) -> ModelSpec:
    config.require("rms_norm", True)
    for name in ("time_step_min", "residual_in_fp32", "norm_before_gate"):
        config.take(name)  # initialisation; precision; read by no version of transformers
    mamba = mamba_spec(
        config,
        heads="num_heads",
        head_dim="head_dim",
        state="state_size",
        activation="hidden_act",
        defaults=(128, 8, 256),
        grouped_norm=False,
        time_step_limit=config.limits("time_step_limit", (0.0, float("inf"))),
    )
    hidden, inner = config.integer("hidden_size", 4096), mamba.num_heads * mamba.head_dim
    config.require("expand", inner // hidden if inner % hidden == 0 else inner / hidden)
    layers = config.integer("num_hidden_layers", 64)
    return ModelSpec(
        model_type=config.model_type,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=mamba.num_heads,
        num_kv_heads=mamba.num_heads,
        head_dim=mamba.head_dim,
        ffn_hidden_size=inner,
        vocab_size=config.integer("vocab_size", 32768),
        max_position_embeddings=1 << 20,  # a recurrence has no limit
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        rope=RopeSpec(10000.0),
        tied_embeddings=config.flag("tie_word_embeddings", False),
        layers=(LayerSpec("mamba", "none", rope=None),) * layers,
        mamba=mamba,
    )


FAMILY = Family("mamba2", "Mamba2ForCausalLM", (*AROUND[0], *MAMBA_LAYER, *AROUND[1]), _spec)
