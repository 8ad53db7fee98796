"""Weights, buffers and optimizer state of experts written at one layout and read at another are the same bits."""

from typing import Any

import numpy as np
import pytest

from tests.support.family_configs import family_config
from tests.support.parity import VOCAB, model_of, random_steps
from tests.support.prediction import predicting_model
from tests.support.ranks import run_ranks
from tests.support.spaces import assemble, weights_of

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ep2": (2, {"ep": 2}),
    "etp2": (2, {"etp": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2-etp1": (2, {"tp": 2, "sequence_parallel": True, "etp": 1}),
    "tp2-ep2": (4, {"tp": 2, "sequence_parallel": True, "ep": 2}),
}


def run(family: str, layout: str, state: Any, num_steps: int, **more: Any) -> dict[str, Any]:
    """One engine on a layout; states of all ranks assembled (which asserts that each element comes once)."""
    make = predicting_model if family == "deepseek_v3" else model_of
    model: Any = make(family_config(family, vocab_size=VOCAB, num_hidden_layers=2))
    weights = {n: w.copy() for n, w in weights_of(model).items()}
    world_size, degrees = LAYOUTS[layout]
    payload = {
        "config": model.config.to_dict(), "weights": weights, "state": state, "step": 2,
        "steps": random_steps()[:num_steps], "world_size": world_size, "layout": degrees,
        "settings": {"lr": 1e-3, "clip_grad": 1.0}, **more,
    }  # fmt: skip
    ranks = run_ranks(world_size, "tests/cpu/test_state_layouts.py:on_rank", payload)
    out = {"first": assemble(r["first"] for r in ranks), "last": assemble(r["last"] for r in ranks)}
    return out | {k: ranks[0][k] for k in ("loss", "step", "trainable")} | {"weights": weights}


@pytest.mark.parametrize(
    ("writer", "reader"), [("ep2", "tp2-etp1"), ("tp2-ep2", "pp2"), ("tp2-etp1", "ep2"), ("etp2", "one")]
)
def test_state_crosses_layouts(writer: str, reader: str) -> None:
    written = run("glm4_moe", writer, None, 2)
    found = run("glm4_moe", reader, written["last"], 1)
    assert found["first"].keys() == written["last"].keys()
    assert [k for k, v in written["last"].items() if not np.array_equal(v, found["first"][k])] == []
    assert found["step"] == 3
    still = [key for key, value in written["first"].items() if np.array_equal(value, written["last"][key])]
    assert still == ["decoder.layers.1.mlp.router.expert_bias"]  # a buffer, which training does not touch
    weights = {key: value for key, value in written["last"].items() if not key.startswith("optimizer.")}
    assert written["trainable"] == found["trainable"] == sum(v.size for k, v in weights.items() if k not in still)


def test_resumed_steps_equal_uninterrupted_ones() -> None:
    """Bit for bit at the same layout; at another one to rounding."""
    steps = random_steps()
    whole, first = (run("qwen2_moe", "ep2", None, n) for n in (3, 2))
    rest = run("qwen2_moe", "ep2", first["last"], 1, steps=steps[2:])
    assert rest["loss"] == whole["loss"][2:]
    assert all(np.array_equal(value, rest["last"][key]) for key, value in whole["last"].items())
    other = run("qwen2_moe", "tp2-etp1", first["last"], 1, steps=steps[2:])
    assert other["loss"] == pytest.approx(whole["loss"][2:], rel=1e-6)


def test_bf16_keeps_fp32_masters_and_buffers() -> None:
    settings = {"lr": 1e-3, "clip_grad": 1.0, "dtype": "BF16"}
    written = run("glm4_moe", "ep2", None, 2, settings=settings)
    key = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
    assert np.abs(written["last"][f"optimizer.master.{key}"] - written["last"][key]).max() > 0
    bias = written["last"]["decoder.layers.1.mlp.router.expert_bias"]
    assert bias.any()
    assert np.array_equal(bias, written["weights"]["model.layers.1.mlp.gate.e_score_correction_bias"])  # no bf16


@pytest.mark.parametrize("trained", [1, 0])
def test_state_with_a_prediction_layer_crosses_layouts_and_resumes(trained: int) -> None:
    """Its weights and optimizer state, or, untrained, its weights alone; the copy of the embedding is not saved."""
    settings, steps = {"lr": 1e-3, "clip_grad": 1.0, "mtp_num_layers": trained}, random_steps()
    whole, first = (run("deepseek_v3", "pp2", None, n, settings=settings) for n in (3, 2))
    rest = run("deepseek_v3", "pp2", first["last"], 1, steps=steps[2:], settings=settings)
    assert rest["loss"] == whole["loss"][2:]
    assert rest["last"].keys() == whole["last"].keys()
    assert all(np.array_equal(value, rest["last"][key]) for key, value in whole["last"].items())
    ahead = [key for key in whole["last"] if "mtp.layers.0.transformer_layer." in key]
    assert any(key.startswith("optimizer.exp_avg.") for key in ahead) == bool(trained)
    other = run("deepseek_v3", "tp2-etp1", first["last"], 1, steps=steps[2:], settings=settings)
    assert [k for k, v in first["last"].items() if not np.array_equal(v, other["first"][k])] == []
    assert other["loss"] == pytest.approx(whole["loss"][2:], rel=1e-6)
