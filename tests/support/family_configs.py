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
}


def family_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """The tiny config.json of a family, with changes."""
    return {"model_type": model_type} | FAMILY_CONFIGS[model_type] | changes
