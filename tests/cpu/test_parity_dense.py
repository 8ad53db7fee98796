"""Promise 2 for dense models: one rank, TP, SP, PP and DP compute what transformers computes.

fp32; logits, loss, gradient norm and every gradient at most 1e-5 apart (max|a - b| / max|b| per tensor).
"""

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.support.parity import VOCAB, differences, megatron_run, random_model, random_steps, reference
from tests.support.spaces import weights_of

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "tp4": (4, {"tp": 4}),
    "tp4-sp": (4, {"tp": 4, "sequence_parallel": True}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
    "tp2-sp-pp2": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
}
SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}
ADAM = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0}
FIRST = ("logits", "loss", "grad_norm", "gradients")
TOLERANCE = 1e-5


@cache
def expected(name: str, optimizer: str) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """(config.json, start weights, what transformers computes in fp64: after Adam's steps fp32 is 8e-6 from that)."""
    model = random_model(name)
    config = {k: v for k, v in model.config.to_dict().items() if v is not None}
    start = {n: w.copy() for n, w in weights_of(model).items()}
    return config, start, reference(model.double(), random_steps(), SGD if optimizer == "sgd" else ADAM)


def run(name: str, layout: str, optimizer: str = "sgd", broken: str | None = None) -> tuple[Any, Any]:
    """(Megatron's results, transformers' results) of three steps."""
    config, start, truth = expected(name, optimizer)
    world_size, degrees = LAYOUTS[layout]
    settings = SGD if optimizer == "sgd" else ADAM
    return megatron_run(config, start, random_steps(), settings, world_size, degrees, broken), truth


FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
WIDE = "llama-4-groups"  # four KV groups, for four tensor-parallel ranks
OTHERS = ("llama-tied", "llama-biases", "qwen3-tied")
NARROW = tuple(layout for layout in LAYOUTS if not layout.startswith("tp4"))


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in FAMILIES for layout in NARROW]
    + [(name, "tp2-sp-pp2") for name in OTHERS]
    + [(WIDE, layout) for layout in ("one", "tp4", "tp4-sp")],
)
def test_three_steps_of_sgd_equal_transformers(name: str, layout: str) -> None:
    found, truth = run(name, layout)
    apart = differences(found, truth, (*FIRST, "weights", "momentum_buffer"))
    assert {n: d for n, d in apart.items() if not d <= TOLERANCE} == {}
    loss_sum, weight_sum = found["evaluated"]
    assert loss_sum / weight_sum == pytest.approx(truth["loss"][0], rel=1e-5)


@pytest.mark.parametrize("layout", NARROW)
def test_three_steps_of_adam_equal_transformers(layout: str) -> None:
    """Adam turns 1e-7 of gradient noise into steps of size lr where a gradient is near zero: norms are compared."""
    found, truth = run("qwen3-tied", layout, "adam")
    apart = differences(found, truth, (*FIRST, "exp_avg", "exp_avg_sq"))
    assert {n: d for n, d in apart.items() if not d <= TOLERANCE} == {}
    for name, weights in truth["weights"].items():
        moved = np.linalg.norm(weights - truth["start"][name])
        assert np.linalg.norm(weights - found["weights"][name]) <= 1e-3 * moved, name


BREAKS = {
    "sp norm reduce": ("qwen3", "tp2-sp", "gradients"),
    "vocabulary mask": ("llama", "tp2", "gradients"),
    "kv group": ("llama", "one", "logits"),
    "tp reduce": ("llama", "tp2", "logits"),
    "tied embedding reduce": ("llama-tied", "pp2", "gradients"),
    "dp reduce": ("llama", "dp2", "gradients"),
    "token weights": ("llama", "one", "loss"),
    "tp mark": ("llama", "tp2", "grad_norm"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_rule_is_seen(broken: str) -> None:
    name, layout, what = BREAKS[broken]
    found, truth = run(name, layout, broken=broken)
    assert max(differences(found, truth, (what,)).values()) > 10 * TOLERANCE


@pytest.mark.parametrize("layout", ["pp2", "tp2-pp2"])
def test_both_copies_of_a_tied_embedding_stay_equal(layout: str) -> None:
    found, _ = run("llama-tied", layout)
    copies = [rank["embedding.word_embeddings.weight"] for rank in found["copies"]]
    half = len(copies) // 2
    for first, last in zip(copies[:half], copies[half:], strict=True):
        assert np.array_equal(first, last)
    if layout == "tp2-pp2":
        assert not copies[1][VOCAB - 502 :].any()  # the padded row of the second tensor-parallel rank


def test_bf16_learns_at_tp2() -> None:
    """bf16 weights, fp32 masters and gradient sums: the first loss is fp32's to bf16's precision, then it falls."""
    config, start, truth = expected("qwen3", "adam")
    steps = [random_steps(num_steps=1)[0]] * 6
    settings = {**ADAM, "lr": 3e-3, "dtype": "BF16"}
    found = megatron_run(config, start, steps, settings, 2, {"tp": 2, "sequence_parallel": True})
    assert found["loss"][0] == pytest.approx(truth["loss"][0], rel=1e-2)
    assert found["loss"][-1] < 0.9 * found["loss"][0]
