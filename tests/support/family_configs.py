"""A tiny model of every family: the config.json from which the generated tests build it.

One entry a family (model_type -> config.json). Fields as the hub spells them; transformers must accept them too,
unless the family is in REMOTE_CODE. Sizes let tensor parallelism 1, 2 and 4 divide (at least 4 KV groups where the
family has them), are small, and differ from each other, so that a wrong axis shows. A family that a test finds in
the catalog and not here fails.
"""

from copy import deepcopy
from typing import Any

BASE: dict[str, Any] = {
    "vocab_size": 103, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.15, "bos_token_id": 1,
    "eos_token_id": 2, "torch_dtype": "float32", "tie_word_embeddings": False,
}  # fmt: skip
"""What most entries share."""

REMOTE_CODE = frozenset({"internlm2", "internlm3", "qwen"})
"""Families that transformers cannot build: their code lies in the model repositories."""

GEMMA: dict[str, Any] = {"head_dim": 12, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
LONGROPE: dict[str, Any] = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 3.0, 7.0]}

EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3}

LATENT: dict[str, Any] = {
    "num_key_value_heads": 8, "q_lora_rank": 12, "kv_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 10, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_group": 4,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "topk_group": 2, "routed_scaling_factor": 1.7,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7},
}  # fmt: skip

FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": BASE | LATENT | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": BASE | LATENT | {"num_nextn_predict_layers": 1},
    "glm4_moe": BASE | {"num_attention_heads": 4, "head_dim": 16, "partial_rotary_factor": 0.5, "use_qk_norm": True,
                        "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "n_group": 4,
                        "topk_group": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
                        "routed_scaling_factor": 1.5, "attention_bias": True, "num_nextn_predict_layers": 0},
    "gpt_oss": BASE | {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 16,
                       "rope_theta": 150000.0, "swiglu_limit": 1.5, "experts_per_token": 3,
                       "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                                        "truncate": False, "original_max_position_embeddings": 16}},
    "mixtral": BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None, "rope_theta": 1e6},
    "olmoe": BASE | EXPERTS | {"num_key_value_heads": 8},
    "qwen2_moe": BASE | EXPERTS | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 48},
    "qwen3_moe": BASE | EXPERTS | {"moe_intermediate_size": 24, "head_dim": 16, "decoder_sparse_step": 2,
                                   "norm_topk_prob": True},
    "gemma": BASE | GEMMA,
    "gemma2": BASE | GEMMA | {"sliding_window": 16, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 3.0,
                              "final_logit_softcapping": 5.0, "num_hidden_layers": 4},
    "gemma3_text": BASE | GEMMA | {"sliding_window": 16, "query_pre_attn_scalar": 10, "sliding_window_pattern": 2,
                                   "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "num_hidden_layers": 4},
    "glm": BASE | {"head_dim": 12, "partial_rotary_factor": 0.5, "attention_bias": True, "pad_token_id": 0},
    "glm4": BASE | {"head_dim": 12, "partial_rotary_factor": 0.5, "attention_bias": False, "pad_token_id": 0},
    "granite": BASE | {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22,
                       "logits_scaling": 4.0, "tie_word_embeddings": True},
    "internlm2": BASE | {"bias": False, "rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "internlm3": BASE | {"head_dim": 12, "qkv_bias": False, "bias": False, "rope_theta": 1e6},
    "llama": BASE | {"hidden_act": "silu", "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    "mistral": BASE | {"head_dim": 12, "sliding_window": 16},
    "olmo2": BASE | {"rope_theta": 500000.0, "pad_token_id": 0},
    "phi3": BASE | {"hidden_size": 64, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 16,
                    "rope_scaling": LONGROPE, "sliding_window": 20, "pad_token_id": 0},
    "qwen": {"vocab_size": 103, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3,
             "num_attention_heads": 4, "kv_channels": 8, "seq_length": 64, "tie_word_embeddings": False},
    "qwen2": BASE | {"tie_word_embeddings": True},
    "qwen3": BASE | {"head_dim": 16, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "starcoder2": BASE | {"norm_epsilon": 1e-5, "sliding_window": 16, "tie_word_embeddings": True},
    "mamba2": {"vocab_size": 103, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8, "expand": 2,
               "state_size": 12, "n_groups": 4, "chunk_size": 8, "torch_dtype": "float32"},
    "nemotron_h": BASE | {"num_hidden_layers": 5, "hybrid_override_pattern": "M-*EM", "head_dim": 12,
                          "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 12, "n_groups": 4,
                          "chunk_size": 8, "n_routed_experts": 6, "moe_intermediate_size": 24,
                          "moe_shared_expert_intermediate_size": 56, "num_experts_per_tok": 2,
                          "time_step_limit": [0.0, float("inf")]},
    "qwen3_next": BASE | {"num_hidden_layers": 4, "head_dim": 16, "partial_rotary_factor": 0.25,
                          "full_attention_interval": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
                          "linear_key_head_dim": 6, "linear_value_head_dim": 10, "decoder_sparse_step": 1,
                          "mlp_only_layers": [1], "num_experts": 6, "num_experts_per_tok": 2,
                          "moe_intermediate_size": 24, "shared_expert_intermediate_size": 56},
}  # fmt: skip


def family_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """The tiny config.json of a family, with changes; a copy, since transformers writes into what it is given."""
    return deepcopy({"model_type": model_type} | FAMILY_CONFIGS[model_type] | changes)
