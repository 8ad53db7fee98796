"""Weights and optimizer state written at one layout and read at another are the same bits; and training goes on."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests.support.parity import random_model, random_steps
from tests.support.ranks import join, run_ranks
from tests.support.spaces import MemoryReader, assemble, gather, read_array, weights_of

WRITERS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "dp2": (2, {}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
}
READERS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "tp2-dp2": (4, {"tp": 2}),
}
SETTINGS: dict[str, Any] = {"lr": 1e-3, "clip_grad": 1.0}


def on_rank(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Load weights or a state, train some steps, return the state before and after them."""
    dims, device = join(payload["world_size"], **payload["layout"])
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine, Microbatch

    reader = MemoryReader(payload["config"], payload["weights"])
    settings = dict(payload["settings"])
    if "lora" in payload:
        from mswift.tuners.lora import LoraConfig

        settings["lora"] = LoraConfig.plain(**payload["lora"])
    engine = MegatronEngine(reader.table, dims, EngineConfig(**settings), device)
    if payload["state"] is None or "lora" in payload:
        engine.load_weights(reader)  # type: ignore[arg-type]
    if payload["state"] is not None:
        state = payload["state"]
        engine.load_state(lambda key, region, out: read_array(state[key], region, out), payload["step"])
    result: dict[str, Any] = {"first": _state(engine)}
    steps = [[Microbatch(*batch) for batch in step] for step in payload["steps"]]
    result["loss"] = [engine.train_step(s[engine.coordinate.dp :: dims.dp], 1e-3).loss for s in steps]
    result["last"], result["step"] = _state(engine), engine.optimizer_step
    result["trainable"] = engine.trainable_parameters
    engine.close()
    return result


def _state(engine: Any) -> dict[str, Any]:
    return gather([*engine.model_shards(), *engine.optimizer_shards()])


def run(name: str, layout: tuple[int, dict[str, Any]], state: Any, num_steps: int, **more: Any) -> dict[str, Any]:
    """One engine on a layout; states of all ranks assembled (which asserts that each element comes once)."""
    model = random_model(name)
    config = {k: v for k, v in model.config.to_dict().items() if v is not None}
    payload = {
        "config": config, "weights": weights_of(model), "state": state, "step": 2, "steps": random_steps()[:num_steps],
        "world_size": layout[0], "layout": layout[1], "settings": SETTINGS, **more,
    }  # fmt: skip
    ranks = run_ranks(layout[0], on_rank, payload)
    out = {"first": assemble(r["first"] for r in ranks), "last": assemble(r["last"] for r in ranks)}
    return out | {k: ranks[0][k] for k in ("loss", "step", "trainable")}


def assert_same_bits(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in expected if not np.array_equal(found[key], expected[key])] == []


@pytest.mark.parametrize(
    ("writer", "reader"), [("tp2", "pp2"), ("dp2", "tp2-dp2"), ("tp2-pp2", "one"), ("dp2", "tp2-sp")]
)
def test_state_crosses_layouts(writer: str, reader: str) -> None:
    name = "llama-biases" if writer == "tp2-pp2" else "qwen3-tied"
    written = run(name, WRITERS[writer], None, 2)
    assert {"optimizer.exp_avg.embedding.word_embeddings.weight"} <= written["last"].keys()
    found = run(name, READERS[reader], written["last"], 1)
    assert_same_bits(found["first"], written["last"])
    assert found["step"] == 3
    still = [key for key, value in written["first"].items() if np.array_equal(value, written["last"][key])]
    assert still == []  # the comparison can fail: two steps moved every tensor


def test_resumed_steps_equal_uninterrupted_ones() -> None:
    """Bit for bit at the same layout; at another one to rounding. Adam's counter goes on where it stood."""
    steps = random_steps()
    whole = run("qwen3", WRITERS["dp2"], None, 3)
    first = run("qwen3", WRITERS["dp2"], None, 2)
    rest = run("qwen3", WRITERS["dp2"], first["last"], 1, steps=steps[2:])
    assert rest["loss"] == whole["loss"][2:]
    assert_same_bits(rest["last"], whole["last"])
    other = run("qwen3", READERS["tp2-dp2"], first["last"], 1, steps=steps[2:])
    assert other["loss"] == pytest.approx(whole["loss"][2:], rel=1e-6)
    wrong = run("qwen3", WRITERS["dp2"], first["last"], 1, steps=steps[2:], step=1)
    assert any(not np.array_equal(wrong["last"][key], whole["last"][key]) for key in whole["last"])


def test_bf16_keeps_fp32_masters() -> None:
    settings = {**SETTINGS, "dtype": "BF16"}
    written = run("llama", WRITERS["tp2"], None, 2, settings=settings)
    key = "decoder.layers.mlp.linear_fc1.weight"
    master, weight = written["last"][f"optimizer.master.{key}"], written["last"][key]
    assert np.abs(master - weight).max() > 0
    assert np.abs(master - weight).max() <= np.abs(weight).max() / 128
    assert {k for k in written["last"] if k.startswith("optimizer.master.")} == {
        f"optimizer.master.{k}" for k in written["last"] if not k.startswith("optimizer.")
    }


def test_adapters_cross_layouts() -> None:
    lora = {
        "rank": 4,
        "alpha": 8.0,
        "target_modules": ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
        "seed": 3,
    }
    written = run("qwen3-tied", WRITERS["tp2-pp2"], None, 2, lora=lora)
    assert all(key.startswith(("adapter.", "optimizer.")) for key in written["last"])
    found = run("qwen3-tied", READERS["tp2-dp2"], written["last"], 1, lora=lora)
    assert_same_bits(found["first"], written["last"])
    assert (
        found["trainable"]
        == written["trainable"]
        == sum(value.size for key, value in written["last"].items() if key.startswith("adapter."))
    )
