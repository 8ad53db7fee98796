"""Overlapped gradient sums and weight gathers change no number: against the one-rank run, fp32, at most 5e-6 apart.

Small buckets, so that several collectives are under way at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.cpu import test_state_layouts as states
from tests.support.family_configs import family_config
from tests.support.parity import VOCAB, differences, megatron_run, model_of, random_model, random_steps
from tests.support.spaces import weights_of

TOLERANCE = 5e-6
SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "mcore": {"bucket_size": 20_000}}
WHAT = ("logits", "loss", "grad_norm", "gradients", "weights", "momentum_buffer")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "ep2": (2, {"ep": 2}),
    "etp2": (2, {"etp": 2}),
    "dp2-vpp2": (4, {"pp": 2, "vpp": 2}),
    "tp2-sp-dp2": (4, {"tp": 2, "sequence_parallel": True}),
}


def steps() -> Any:
    return random_steps(num_microbatches=4, batch=1)


@cache
def one_rank(name: str) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """(config.json, start weights, what one rank computes without overlap)."""
    moe = name.endswith("moe")
    model = model_of(family_config(name, vocab_size=VOCAB, num_hidden_layers=2)) if moe else random_model(name)
    config = {k: v for k, v in model.config.to_dict().items() if v is not None}
    start = {n: w.copy() for n, w in weights_of(model).items()}
    return config, start, megatron_run(config, start, steps(), SGD, 1, {})


def run(name: str, layout: str, broken: str | None = None) -> dict[str, float]:
    """Differences between the overlapped run and the one-rank run."""
    config, start, truth = one_rank(name)
    world_size, degrees = LAYOUTS[layout]
    return differences(megatron_run(config, start, steps(), SGD | OVERLAP, world_size, degrees, broken), truth, WHAT)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama-tied", "dp2"),
        ("qwen2_moe", "ep2"),
        ("qwen2_moe", "etp2"),
        ("llama-tied", "dp2-vpp2"),
        ("qwen3", "tp2-sp-dp2"),
    ],
)
def test_overlap_computes_what_one_rank_computes(name: str, layout: str) -> None:
    assert {n: d for n, d in run(name, layout).items() if not d <= TOLERANCE} == {}


@contextmanager
def no_gather() -> Iterator[None]:
    """Weights are used as they are, before the gather."""
    from unittest.mock import patch

    from mswift.parallel.megatron.data_parallel import DataParallel

    with patch.object(DataParallel, "_gathering", lambda _self, _unit: lambda *_: None):
        yield


def test_a_missing_gather_is_seen() -> None:
    assert max(run("llama-tied", "dp2", "tests/cpu/test_parity_overlap.py:no_gather").values()) > 1000 * TOLERANCE


def adapters(**more: Any) -> dict[str, Any]:
    lora = {"rank": 4, "alpha": 8.0, "target_modules": ("q_proj", "v_proj", "down_proj"), "seed": 3}
    settings = {**states.SETTINGS, "optimizer": "sgd", **more}
    return states.run("qwen3", (2, {}), None, 3, lora=lora, settings=settings)


def moved_apart(found: dict[str, Any], expected: dict[str, Any]) -> float:
    return max(
        float(np.abs(found["last"][k] - v).max()) for k, v in expected["last"].items() if k.startswith("adapter")
    )


@contextmanager
def hooks_of_megatron_core() -> Iterator[None]:
    """Each module waits for its own parameters only."""
    from unittest.mock import patch

    from megatron.core.distributed import DistributedDataParallel

    from mswift.parallel.megatron.data_parallel import DataParallel

    with patch.object(DataParallel, "enable_forward_pre_hook", DistributedDataParallel.enable_forward_pre_hook):
        yield


def test_adapters_are_gathered_too() -> None:
    """Also those whose module nobody calls, as that of A and B."""
    expected = adapters()
    assert moved_apart(adapters(**OVERLAP), expected) == 0.0
    assert adapters(**OVERLAP)["loss"] == expected["loss"]


def on_rank_with_their_hooks(payload: Any) -> Any:
    """`test_state_layouts.on_rank` with megatron-core's hooks."""
    from tests.support.ranks import join

    join(payload["world_size"], **payload["layout"])
    with hooks_of_megatron_core():
        return states.on_rank(payload)


def test_megatron_cores_hooks_forget_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = adapters()
    monkeypatch.setattr(states, "on_rank", on_rank_with_their_hooks)
    assert adapters(**OVERLAP)["loss"] != pytest.approx(expected["loss"], rel=1e-6)
