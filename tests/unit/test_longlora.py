"""LongLoRA without torch: what is trained beside the adapters, what is refused."""

import dataclasses
import math
from typing import Any

import pytest

from mswift.config.train import SftConfig
from mswift.converters.adapters import expand_modules_to_save, saved_shapes
from mswift.converters.plan import table_for
from mswift.refusals import train_refusals
from mswift.train.trained import trained_parameters
from tests.support.family_configs import family_config

LONG = SftConfig(model="m", dataset=("a.jsonl",), train_iters=1, backend="fsdp", tuner_type="longlora", lora_rank=4)


def test_embeddings_and_norms_are_trained_beside_the_adapters() -> None:
    table = table_for(family_config("llama"))
    lora = trained_parameters(dataclasses.replace(LONG, tuner_type="lora"), table)
    assert trained_parameters(LONG, table) == lora + 103 * 32 + (2 * 3 + 1) * 32


def test_norms_are_those_of_the_model() -> None:
    table = table_for(family_config("qwen3"))
    shapes = saved_shapes(table, expand_modules_to_save(table, ["norm"]))
    assert shapes.keys() == {name for name in table.hf if "norm" in name}
    assert sum(map(math.prod, shapes.values())) == 32 + 3 * (2 * 32 + 2 * 16)
    tied = table_for(family_config("qwen2"))
    assert expand_modules_to_save(tied, ["norm"]) == ("norm",)
    assert expand_modules_to_save(tied, ["norm", "embed_tokens"]) == ("embed_tokens", "lm_head", "norm")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"backend": "megatron"}, "--tuner_type longlora trains transformers' model: use --backend fsdp"),
        ({"packing": True}, "--packing with --tuner_type longlora"),
        ({"context_parallel_size": 2}, "--context_parallel_size 2 with --tuner_type longlora"),
        ({"sequence_parallel_size": 2}, "--sequence_parallel_size 2 with --tuner_type longlora"),
        ({"adapters": ("a",)}, "--adapters a with --tuner_type longlora"),
        ({"tuner_type": "lora", "backend": "megatron", "modules_to_save": ("norm",)}, "--modules_to_save norm is for"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(change: dict[str, Any], text: str) -> None:
    spec = table_for(family_config("llama")).spec
    assert train_refusals(LONG, spec, 1) == []
    found = [str(refusal) for refusal in train_refusals(dataclasses.replace(LONG, **change), spec, 2)]
    assert any(text in refusal for refusal in found), found


def test_an_odd_number_of_heads_is_refused() -> None:
    spec = table_for(family_config("llama", num_attention_heads=3, num_key_value_heads=3, head_dim=8)).spec
    found = [str(refusal) for refusal in train_refusals(LONG, spec, 1)]
    assert any("--tuner_type longlora: 3 attention heads have no halves" in refusal for refusal in found), found
