"""Promise 2 for the dense families: each computes on Megatron what transformers computes: one rank, TP2 with SP, PP2.

fp32; logits, loss, gradient norm, every gradient, and weights after three steps of SGD at most 1e-5 apart.
"""

from functools import cache
from typing import Any

import pytest

from tests.support.family_configs import LONGROPE, family_config
from tests.support.parity import VOCAB, differences, megatron_run, model_of, random_steps, reference
from tests.support.spaces import weights_of

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
}
SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}
FIRST = ("logits", "loss", "grad_norm", "gradients")
TOLERANCE = 1e-5
FAMILIES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "granite",
    "mistral",
    "olmo2",
    "phi3",
    "qwen3",
    "starcoder2",
)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama, yarn": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    "qwen2, yarn, upper windows": {
        "rope_scaling": YARN, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2,
    },
    "qwen3, yarn": {"rope_scaling": YARN | {"attention_factor": 1.3}, "attention_bias": True},
    "mistral, yarn": {"rope_scaling": YARN | {"truncate": False}, "sliding_window": None},
    "phi3, within the first length": {"original_max_position_embeddings": 32, "tie_word_embeddings": True},
    "gemma2, no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma3_text, final cap, untied": {"final_logit_softcapping": 2.0, "tie_word_embeddings": False},
    "glm4, biases": {"attention_bias": True},
    "olmo2, biases": {"attention_bias": True},
    "granite, biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "starcoder2, no biases": {"use_bias": False, "tie_word_embeddings": False},
}  # fmt: skip


@cache
def expected(name: str) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """(config.json, start weights, what transformers computes) of a family or a variant."""
    changes = {"vocab_size": VOCAB, "num_hidden_layers": 4} | VARIANTS.get(name, {})
    model = model_of(family_config(name.partition(",")[0], **changes))
    start = {n: w.copy() for n, w in weights_of(model).items()}
    return model.config.to_dict(), start, reference(model, random_steps(), SGD)


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family in FAMILIES for layout in ("one", "tp2-sp", "pp2")]
    + [(family, "tp2") for family in ("gemma2", "olmo2", "starcoder2")]
    + [(name, "tp2-sp") for name in VARIANTS],
)
def test_three_steps_of_sgd_equal_transformers(family: str, layout: str) -> None:
    config, start, truth = expected(family)
    world_size, degrees = LAYOUTS[layout]
    found = megatron_run(config, start, random_steps(), SGD, world_size, degrees)
    apart = differences(found, truth, (*FIRST, "weights", "momentum_buffer"))
    assert {n: d for n, d in apart.items() if not d <= TOLERANCE} == {}
    loss_sum, weight_sum = found["evaluated"]
    assert loss_sum / weight_sum == pytest.approx(truth["loss"][0], rel=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "starcoder2"])
def test_bf16_gives_the_loss_of_fp32_to_its_precision(family: str) -> None:
    config, start, truth = expected(family)
    found = megatron_run(config, start, random_steps(), {**SGD, "dtype": "BF16"}, 2, LAYOUTS["tp2-sp"][1])
    assert found["loss"] == pytest.approx(truth["loss"], rel=1e-2)


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("mistral", {"sliding_window": 17}),
    "windows of the upper layers": ("qwen3", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    "windows in turn": ("gemma2", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    "attention soft-cap": ("gemma2", {"attn_logit_softcapping": 3.1}),
    "no attention soft-cap": ("gemma2", {"attn_logit_softcapping": None}),
    "logit soft-cap": ("gemma2", {"final_logit_softcapping": 5.1}),
    "attention scale": ("gemma3_text", {"query_pre_attn_scalar": 11}),
    "rope of layers with a window": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1.1e4},
            }
        },
    ),
    "rotated share of a head": (
        "glm",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
            "partial_rotary_factor": 1.0,
        },
    ),
    "embedding multiplier": ("granite", {"embedding_multiplier": 3.1}),
    "residual multiplier": ("granite", {"residual_multiplier": 0.23}),
    "attention multiplier": ("granite", {"attention_multiplier": 0.21}),
    "logit divisor": ("granite", {"logits_scaling": 4.1}),
    "longrope's long factors": (
        "phi3",
        {
            "rope_parameters": LONGROPE
            | {"rope_theta": 10000.0, "partial_rotary_factor": 0.75}
            | {"original_max_position_embeddings": 32},
            "original_max_position_embeddings": 32,
        },
    ),
}
"""A field in which Megatron's model differs from the one in transformers: all but that field must then be right."""


@pytest.mark.parametrize("changed", CHANGES)
def test_another_value_is_seen(changed: str) -> None:
    family, fields = CHANGES[changed]
    config, start, truth = expected(family)
    assert set(fields) <= set(config)
    found = megatron_run(config | fields, start, random_steps(num_steps=1), SGD, 1, {})
    assert differences(found, truth, ("logits",))["logits"] > 100 * TOLERANCE


BREAKS = {
    "width norm's sum": ("olmo2", "tp2", "logits"),
    "width norm's gradient sum": ("olmo2", "tp2", "gradients"),
    "sp norm reduce": ("gemma2", "tp2-sp", "gradients"),
    "sp norm reduce of biases": ("starcoder2", "tp2-sp", "gradients"),
    "1 + w": ("gemma", "one", "logits"),
    "neighbours": ("glm4", "one", "logits"),
    "tanh": ("starcoder2", "one", "logits"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_rule_is_seen(broken: str) -> None:
    family, layout, what = BREAKS[broken]
    config, start, truth = expected(family)
    world_size, degrees = LAYOUTS[layout]
    found = megatron_run(config, start, random_steps(num_steps=1), SGD, world_size, degrees, broken)
    assert max(differences(found, truth, (what,)).values()) > 10 * TOLERANCE
