"""The coverage proof refuses a table that loses, doubles or misplaces an element, before any byte moves."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mswift.converters.catalog import family_for, spec_for
from mswift.converters.engine import convert
from mswift.converters.layout import Piece
from mswift.converters.plan import ModelTable, table_for
from mswift.converters.rule import Rule
from mswift.converters.tables.mla import DECODER
from mswift.errors import CheckpointError
from tests.support.checkpoints import random_model, tiny_config
from tests.support.family_configs import family_config

QKV = "decoder.layers.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.mlp.linear_fc1.weight"


def moved_by_one_row(piece: Piece) -> Piece:
    start = piece.starts[1]
    return replace(piece, starts=(piece.starts[0], (start[0], start[1] + 1, *start[2:])))


def one_group_twice(piece: Piece) -> Piece:
    """Every Megatron group takes the first KV group of HF."""
    first = piece.dims[0]
    return replace(piece, dims=(replace(first, step=(0, first.step[1])), *piece.dims[1:]))


def one_row_less(piece: Piece) -> Piece:
    rows = next(i for i, d in enumerate(piece.dims) if d.step == (1, 1))
    dims = list(piece.dims)
    dims[rows] = replace(dims[rows], size=dims[rows].size - 1)
    return replace(piece, dims=tuple(dims))


PLANTS: dict[str, tuple[str, Callable[[Piece], Piece], str]] = {
    "up_proj one row late": (".1.mlp.up_proj.weight", moved_by_one_row, FC1),
    "k_proj one row late": (".0.self_attn.k_proj.weight", moved_by_one_row, QKV),
    "a KV group doubled": (".2.self_attn.k_proj.weight", one_group_twice, "k_proj"),
    "a row of down_proj lost": (".1.mlp.down_proj.weight", one_row_less, "down_proj"),
    "a row of the vocabulary lost": ("model.embed_tokens.weight", one_row_less, "embed_tokens"),
}


def plant(monkeypatch: pytest.MonkeyPatch, suffix: str, change: Callable[[Piece], Piece]) -> None:
    """From now on the rule that moves the HF tensor with that suffix is wrong."""
    right = Rule.pieces

    def wrong(self: Rule, *args: Any) -> list[Piece]:
        return [change(p) if p.names[0].endswith(suffix) else p for p in right(self, *args)]

    monkeypatch.setattr(Rule, "pieces", wrong)


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    suffix, change, tensor = PLANTS[name]
    random_model(tmp_path / "hf", "llama")
    table_for(tiny_config())  # without the fault it is accepted
    plant(monkeypatch, suffix, change)
    with pytest.raises(CheckpointError, match="exactly once") as caught:
        convert(tmp_path / "hf", tmp_path / "out", "megatron")
    assert tensor in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"]


def test_a_rule_left_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ModelTable.pieces
    monkeypatch.setattr(ModelTable, "pieces", lambda self, key, *rest: [] if key == FC1 else right(self, key, *rest))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight of shape .* are covered 0 times"):
        table_for(tiny_config())


def moved_by_one_expert(piece: Piece) -> Piece:
    start = piece.starts[1]
    return replace(piece, starts=(piece.starts[0], (start[0] + 1, *start[1:])))


EXPERT_PLANTS: dict[str, tuple[str, Callable[[Piece], Piece], str]] = {
    "an expert in the place of the next": (".1.mlp.experts.5.down_proj.weight", moved_by_one_expert, "experts.5.down"),
    "the first expert one row late": (
        ".2.mlp.experts.0.up_proj.weight",
        moved_by_one_row,
        "expert 1 is moved otherwise than expert 0",
    ),
    "the last expert one row short": (".2.mlp.experts.7.down_proj.weight", one_row_less, "experts.7.down"),
    "an expert read as another": (
        ".1.mlp.experts.3.gate_proj.weight",
        lambda p: replace(p, names=(p.names[0].replace("experts.3", "experts.4"), p.names[1])),
        "expert 3 is moved otherwise",
    ),
}


@pytest.mark.parametrize("name", EXPERT_PLANTS)
def test_a_fault_planted_in_one_expert_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    suffix, change, tensor = EXPERT_PLANTS[name]
    config = family_config("deepseek_v3")
    table_for(config)
    plant(monkeypatch, suffix, change)
    with pytest.raises(CheckpointError, match="exactly once") as caught:
        table_for(config)
    assert tensor in str(caught.value)


def test_experts_that_share_a_tensor_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = tuple(
        replace(rule, parts=tuple(replace(part, hf=part.hf.replace("{e}", "0")) for part in rule.parts))
        if isinstance(rule, Rule) and "fc2" in rule.megatron
        else rule
        for rule in DECODER
    )
    config = family_config("deepseek_v3")
    family = family_for(config)
    with pytest.raises(CheckpointError, match=r"experts.0.down_proj.weight: the table gives it to experts 0 and 1"):
        ModelTable(config, replace(family, table=rules), spec_for(config, family))


def test_the_largest_published_dense_shapes_are_proved_quickly() -> None:
    """405B: 126 layers, 8 KV groups. No element or row is ever enumerated."""
    big = tiny_config(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, head_dim=128, vocab_size=128256,
    )  # fmt: skip
    table = table_for(big)
    elements = sum(math.prod(shape) for shape in table.hf.values())
    assert elements == 405_853_388_800
