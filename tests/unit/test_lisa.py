"""LISA without torch: layers are drawn evenly by seed and interval; what the state of a layer has seen; refusals."""

import dataclasses
from collections import Counter
from typing import Any

import pytest

from mswift.config.train import SftConfig
from mswift.converters.plan import table_for
from mswift.refusals import train_refusals
from mswift.topology import ParallelDims
from mswift.train.memory import fsdp_memory
from mswift.tuners.lisa import LayerSampling
from tests.support.family_configs import family_config

LISA = SftConfig(
    model="m", dataset=("a.jsonl",), train_iters=1, backend="ddp", lisa_activated_layers=2, lisa_step_interval=5
)


def test_layers_are_drawn_evenly_and_by_the_seed_alone() -> None:
    sampling = LayerSampling(8, 2, 5, seed=3)
    assert sampling.active_at(5) == sampling.active_at(9) == LayerSampling(8, 2, 5, seed=3).active_at(7)
    drawn = Counter(layer for n in range(4000) for layer in sampling.active_at(5 * n))
    assert sum(drawn.values()) == 8000
    assert all(abs(drawn[layer] - 1000) < 120 for layer in range(8)), drawn  # four standard deviations
    other = [LayerSampling(8, 2, 5, seed=4).active_at(5 * n) == sampling.active_at(5 * n) for n in range(100)]
    assert sum(other) < 20


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_the_state_of_a_layer_has_seen_the_updates_since_it_was_last_drawn(interval: int) -> None:
    sampling, seen = LayerSampling(3, 2, interval, seed=0), dict.fromkeys(range(3), 0)
    for update in range(40):
        active = sampling.active_at(update)
        seen = {layer: count + 1 if layer in active else 0 for layer, count in seen.items()}
        assert {layer: sampling.updates_of(layer, update + 1) for layer in seen} == seen
    assert sampling.updates_of(0, 0) == 0


def test_the_estimate_counts_state_of_the_layers_that_are_trained_at_a_time() -> None:
    table = table_for(family_config("llama", num_hidden_layers=32))
    full, lisa = (
        fsdp_memory(dataclasses.replace(LISA, lisa_activated_layers=n), table, ParallelDims(), 4) for n in (0, 2)
    )
    assert lisa.weights_bytes == full.weights_bytes
    assert lisa.optimizer_bytes < full.optimizer_bytes / 5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"backend": "megatron"}, "--lisa_activated_layers 2 is for transformers' model: use --backend fsdp"),
        ({"tuner_type": "lora"}, "--lisa_activated_layers 2 with --tuner_type lora: LISA trains in full"),
        (
            {"lisa_activated_layers": 4},
            "--lisa_activated_layers 4 of a model with 3 layers: use --lisa_activated_layers 2",
        ),
        ({"lisa_activated_layers": -1}, "--lisa_activated_layers -1 must not be negative"),
        ({"lisa_activated_layers": 0}, "--lisa_step_interval 5 has no effect without --lisa_activated_layers 2"),
        ({"lisa_step_interval": 0}, "--lisa_step_interval 0 must be at least 1"),
        ({"freeze_parameters_ratio": 0.5}, "--freeze_parameters_ratio both say what is frozen"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(change: dict[str, Any], text: str) -> None:
    spec = table_for(family_config("llama")).spec
    assert train_refusals(LISA, spec, 1) == []
    found = [str(refusal) for refusal in train_refusals(dataclasses.replace(LISA, **change), spec, 1)]
    assert any(text in refusal for refusal in found), found
