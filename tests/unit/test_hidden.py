"""Tuners of hidden states without torch: what they hold, their file, what is refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from mswift.config.train import SftConfig
from mswift.converters.plan import table_for
from mswift.errors import ConfigError, MswiftError
from mswift.refusals import train_refusals
from mswift.train.trained import trained_parameters
from mswift.tuners.hidden import hidden_config, is_hidden, parse_hidden
from mswift.tuners.other_adapters import check_hidden
from tests.support.family_configs import family_config

TABLE = table_for(family_config("llama"))
FINE = SftConfig(model="m", dataset=("a.jsonl",), train_iters=1, backend="ddp")
LAYERS, HIDDEN = 3, 32


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        ({"tuner_type": "adapter", "adapter_length": 5}, LAYERS * 2 * (2 * 5 * HIDDEN + 5 + HIDDEN)),
        ({"tuner_type": "reft", "reft_rank": 3}, LAYERS * (2 * 3 * HIDDEN + 3)),
        ({"tuner_type": "reft", "reft_rank": 3, "reft_layers": (2, 0)}, 2 * (2 * 3 * HIDDEN + 3)),
    ],
)
def test_trained_parameters(flags: dict[str, Any], count: int) -> None:
    assert trained_parameters(dataclasses.replace(FINE, **flags), TABLE) == count


@pytest.mark.parametrize("kind", ["adapter", "reft"])
def test_the_file_says_what_it_is(kind: str) -> None:
    config = hidden_config(TABLE, kind, 4, (1,) if kind == "reft" else (), "gelu" if kind == "reft" else "silu")
    data = json.loads(config.text(TABLE, (), "base"))
    assert is_hidden(data)
    assert data["peft_type"] == kind.upper()
    assert parse_hidden(data, Path("f"), LAYERS) == config
    assert parse_hidden(data, Path("f"), LAYERS).shapes(TABLE) == config.shapes(TABLE)
    assert math.prod(next(iter(config.shapes(TABLE).values()))) == 4 * HIDDEN


@pytest.mark.parametrize(
    "change", [{"reft_rank": 0}, {"reft_rank": "4"}, {"reft_layers": [3]}, {"more": 1}, {"reft_layers": None}]
)
def test_a_file_of_somebody_else_is_refused(change: dict[str, Any]) -> None:
    data = hidden_config(TABLE, "reft", 4, (1,)).content(None) | change
    with pytest.raises(ConfigError, match="f is not what mswift export writes for REFT of a model with 3 layers"):
        parse_hidden(data, Path("f"), LAYERS)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((4, (3,)), "--reft_layers 3: the model has layers 0 to 2"),
        ((32, ()), "--reft_rank 32 of hidden states of 32: use --reft_rank 31 or less"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(numbers: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        hidden_config(TABLE, "reft", *numbers)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"backend": "megatron"}, "--tuner_type reft trains transformers' model: use --backend fsdp"),
        ({"adapter_length": 4}, "--adapter_length 4 has no effect with --tuner_type reft"),
        ({"tuner_type": "lora"}, "--reft_layers 1 has no effect with --tuner_type lora"),
        ({"reft_rank": 0}, "--reft_rank 0 must be at least 1"),
        ({"lora_rank": 4}, "--lora_rank 4 has no effect with --tuner_type reft"),
        ({"modules_to_save": ("lm_head",)}, "--modules_to_save lm_head has no effect with --tuner_type reft"),
        ({"new_special_tokens": ("<a>",)}, "--new_special_tokens <a> with --tuner_type reft"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(change: dict[str, Any], text: str) -> None:
    config = dataclasses.replace(FINE, tuner_type="reft", reft_layers=(1,))
    assert train_refusals(config, TABLE.spec, 1) == []
    found = [str(refusal) for refusal in train_refusals(dataclasses.replace(config, **change), TABLE.spec, 1)]
    assert any(text in refusal for refusal in found), found


def test_another_adapter_is_not_continued(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(hidden_config(TABLE, "reft", 4, ()).text(TABLE, (), None))
    check_hidden(dataclasses.replace(FINE, tuner_type="reft"), TABLE, tmp_path)
    for flags, text in (
        ({"tuner_type": "adapter"}, "is REFT: use --tuner_type reft"),
        ({"tuner_type": "reft", "reft_rank": 5}, "--reft_rank 5: the adapter of .* has 4"),
    ):
        with pytest.raises(MswiftError, match=text):
            check_hidden(dataclasses.replace(FINE, **flags), TABLE, tmp_path)
