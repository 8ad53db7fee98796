"""Nemotron-H, Nemotron Nano 2 and 3: Mamba-2, attention without positions, squared-ReLU MLPs, mixtures of experts."""

from mswift.converters.family import Family
from mswift.converters.fields import Fields
from mswift.converters.spec import ModelSpec, RopeSpec
from mswift.converters.tables.hybrid import HYBRID, hybrid_layers, hybrid_moe
from mswift.converters.tables.mamba import mamba_spec


def _spec(config: Fields) -> ModelSpec:
    for name, value in (("attention_bias", False), ("mamba_proj_bias", False), ("num_nextn_predict_layers", 0)):
        config.require(name, value)
    for name in ("attention_dropout", "hidden_dropout"):
        config.require(name, 0)
    for name in ("time_step_limit", "expand", "residual_in_fp32", "num_logits_to_keep", "mtp_layers_block_type"):
        config.take(name)  # read by no version of transformers when training, or of layers that there are not
    for name in ("use_mamba_kernels", "mamba_ssm_cache_dtype"):
        config.take(name)
    config.no_sliding_window()
    eps = config.number("layer_norm_epsilon", 1e-5)
    config.require("rms_norm_eps", eps)
    config.require("mlp_hidden_act", "relu2")
    layers = hybrid_layers(config)
    heads = config.integer("num_attention_heads", 32)
    return ModelSpec(
        model_type=config.model_type,
        num_layers=len(layers),
        hidden_size=config.integer("hidden_size", 4096),
        num_attention_heads=heads,
        num_kv_heads=config.integer("num_key_value_heads", 8),
        head_dim=config.integer("head_dim", config.integer("attention_head_dim", 128)),
        ffn_hidden_size=config.integer("intermediate_size", 21504),
        vocab_size=config.integer("vocab_size", 131072),
        max_position_embeddings=config.integer("max_position_embeddings", 4096),
        norm_eps=eps,
        rope=RopeSpec(10000.0),
        tied_embeddings=config.flag("tie_word_embeddings", False),
        mlp_bias=config.flag("mlp_bias", False),
        activation="relu2",
        gated=False,
        layers=layers,
        moe=hybrid_moe(config, any(layer.mlp == "moe" for layer in layers)),
        mamba=mamba_spec(
            config,
            heads="mamba_num_heads",
            head_dim="mamba_head_dim",
            state="ssm_state_size",
            activation="mamba_hidden_act",
            defaults=(128, 8, 128),
            grouped_norm=True,
            time_step_limit=(config.number("time_step_min", 0.001), float("inf")),  # as transformers clamps it
        ),
    )


FAMILY = Family("nemotron_h", "NemotronHForCausalLM", HYBRID, _spec)
