"""A run goes on with the samples that it would have had; anything else is refused by the flag that made it so."""

import dataclasses
from typing import Any

import pytest

from mswift.data.order import ORDER_VERSION
from mswift.errors import ConfigError
from mswift.train.checkpoint import RunState, check_same_data

STATE = RunState(3, 24, 3, 1, {}, "hash", 20, {"seed": 42, "modules_to_save": []}, order_version=ORDER_VERSION)


def test_the_same_run_goes_on() -> None:
    check_same_data(STATE, "hash", 20, {"seed": 42, "modules_to_save": (), "max_length": 2048})


@pytest.mark.parametrize(
    ("state", "now", "message"),
    [
        ({"order_version": 1}, {}, f"order 1, this mswift draws order {ORDER_VERSION}"),
        ({"data_fingerprint": "other"}, {}, r"--dataset: .* step 3 \(20 samples then, 20 now\)"),
        ({}, {"seed": 7}, "--seed: the run of this --output_dir has 42, the command says 7; pass 42"),
        (
            {
                "config": {
                    **STATE.config,
                    "freeze_parameters": ["model.embed_tokens", "lm_head"],
                    "quant_method": "gptq",
                }
            },
            {"freeze_parameters": ("lm_head",)},
            "has model.embed_tokens lm_head, the command says lm_head; pass model.embed_tokens lm_head, or start",
        ),
        (
            {"config": {**STATE.config, "quant_method": "gptq"}},
            {"quant_method": None},
            "has gptq, the command says none; pass gptq, or start",
        ),
        ({}, {"quant_method": "bnb"}, "has none, the command says bnb; leave it out, or start"),
        ({}, {"max_length": 64}, "--max_length: the run of this --output_dir has 2048, the command says 64"),
    ],
)
def test_another_run_is_refused(state: dict[str, Any], now: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_same_data(dataclasses.replace(STATE, **state), "hash", 20, now)


def test_a_state_of_before_orders_had_versions_is_of_the_first() -> None:
    value = {name: field for name, field in STATE.as_dict().items() if name not in ("version", "order_version")}
    assert RunState(**value).order_version == 1
