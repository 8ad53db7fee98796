"""A tiny model of every family: the config.json from which the generated tests build it.

One entry a family (model_type -> config.json). Fields as the hub spells them; transformers must accept them too,
unless the family is in REMOTE_CODE. Sizes let tensor parallelism 1, 2 and 4 divide (at least 4 KV groups where the
family has them), are small, and differ from each other, so that a wrong axis shows. A family that a test finds in
the catalog and not here fails.
"""

from typing import Any

BASE: dict[str, Any] = {
    "vocab_size": 103, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.15, "bos_token_id": 1,
    "eos_token_id": 2, "torch_dtype": "float32", "tie_word_embeddings": False,
}  # fmt: skip
"""What most entries share."""

REMOTE_CODE: frozenset[str] = frozenset()
"""Families that transformers cannot build: their code lies in the model repositories."""

FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": BASE | {"hidden_act": "silu", "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    "mistral": BASE | {"head_dim": 12, "sliding_window": None},
    "qwen2": BASE | {"tie_word_embeddings": True},
    "qwen3": BASE | {"head_dim": 16},
    "mamba2": {
        "vocab_size": 103,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_heads": 8,
        "head_dim": 8,
        "expand": 2,
        "state_size": 12,
        "n_groups": 4,
        "chunk_size": 8,
        "torch_dtype": "float32",
    },
    "nemotron_h": BASE
    | {
        "num_hidden_layers": 5,
        "hybrid_override_pattern": "M-*EM",
        "head_dim": 12,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 12,
        "n_groups": 4,
        "chunk_size": 8,
        "n_routed_experts": 6,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 56,
        "num_experts_per_tok": 2,
        "time_step_limit": [0.0, float("inf")],
    },
    "qwen3_next": BASE
    | {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 4,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 10,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 56,
    },
}


def family_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """The tiny config.json of a family, with changes."""
    return {"model_type": model_type} | FAMILY_CONFIGS[model_type] | changes
