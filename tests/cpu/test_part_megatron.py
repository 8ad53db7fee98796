"""A part of a model, trained on megatron-core's: what transformers computes with the rest frozen, at any layout."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from mswift.tuners.part import Part
from tests.support.parity import differences, megatron_run, random_model, random_steps, reference
from tests.support.spaces import weights_of

SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}
PARTS: Mapping[str, Part] = {
    "share and names": Part(
        ratio=0.4, freeze=("model.layers.3.mlp", "model.layers.1.self_attn.v"), trainable_regex=r"layers\.0\..*norm"
    ),
    "first stage frozen": Part(freeze=("model.embed_tokens", "model.layers.0", "model.layers.1")),
    "norms": Part(freeze_regex=".", trainable_regex="norm"),
    "biases": Part(freeze_regex=".", trainable_regex=r"bias$"),
    "last stage frozen": Part(freeze=("model.layers.2", "model.layers.3", "model.norm", "lm_head")),
}
AGAIN = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES: list[tuple[str, str, int, dict[str, Any], dict[str, Any]]] = [
    ("qwen3", "share and names", 1, {}, {}),
    ("qwen3", "share and names", 2, {"tp": 2, "sequence_parallel": True}, {}),
    ("qwen3", "first stage frozen", 2, {"pp": 2}, {}),
    ("qwen3", "last stage frozen", 2, {"pp": 2}, {}),
    ("qwen3-tied", "first stage frozen", 2, {"pp": 2}, {}),
    ("qwen3", "norms", 2, {}, AGAIN),
    ("llama-biases", "norms", 2, {"tp": 2}, {}),
    ("llama-biases", "biases", 2, {"tp": 2}, {}),
    ("starcoder2", "biases", 2, {"tp": 2, "sequence_parallel": True}, {}),
]


@pytest.mark.parametrize(("name", "part", "world_size", "dims", "more"), CASES)
def test_equals_transformers(name: str, part: str, world_size: int, dims: Any, more: Any) -> None:
    model = random_model(name)
    config, start = model.config.to_dict(), {n: w.copy() for n, w in weights_of(model).items()}
    frozen = PARTS[part].frozen({n: p.numel() for n, p in model.named_parameters()})
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name not in frozen)
    steps = random_steps()
    wanted = reference(model, steps, SGD)
    found = megatron_run(config, start, steps, SGD | {"part": PARTS[part]} | more, world_size, dims)
    assert {
        n: d for n, d in differences(found, wanted, ("loss", "grad_norm", "weights")).items() if not d <= 1e-5
    } == {}
    assert all(np.array_equal(found["weights"][n], start[n]) for n in frozen)
