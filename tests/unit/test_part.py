"""Which parameters a part of the model is: by share, by name, by expression; what means nothing is refused."""

import math
from dataclasses import replace
from typing import Any

import pytest

from mswift.config.train import TrainConfig
from mswift.converters.plan import table_for
from mswift.errors import ConfigError
from mswift.train.trained import trained_parameters
from mswift.tuners.part import Part, joined, refuse_torn
from tests.support.family_configs import family_config

SIZES = {
    "embed.weight": 40,
    "layers.0.a.weight": 20,
    "layers.0.b.weight": 20,
    "layers.1.a.weight": 15,
    "head.weight": 5,
}


@pytest.mark.parametrize(
    ("part", "frozen"),
    [
        ({}, 0), ({"ratio": 0.39}, 0), ({"ratio": 0.4}, 1), ({"ratio": 0.79}, 2), ({"ratio": 0.999}, 4),
        ({"freeze": ("layers.0",)}, 2), ({"freeze_regex": r"a\.weight$"}, 2),
        ({"ratio": 0.8, "trainable": ("embed",)}, 2),
        ({"ratio": 0.8, "trainable_regex": r"\.b\."}, 2), ({"freeze": ("head",), "ratio": 0.4}, 2),
    ],
)  # fmt: skip
def test_frozen(part: dict[str, Any], frozen: int) -> None:
    assert len(Part(**part).frozen(SIZES)) == frozen


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"freeze": ("layer.0",)}, "--freeze_parameters layer.0: no parameter's name begins so; near: layers.0, "),
        ({"trainable": ("x",)}, "--trainable_parameters x: no parameter"),
        ({"freeze": ("0.a",)}, "--freeze_parameters 0.a: no parameter's name begins so; near: layers.0.a$"),
        (
            {"freeze": ("layers.7.",)},
            "--freeze_parameters layers.7.: no parameter's name begins so; near: layers.[0-9].,",
        ),
        ({"freeze_regex": "("}, r"--freeze_parameters_regex \(: no regular expression"),
        ({"trainable_regex": "zzz"}, "--trainable_parameters_regex zzz: matches no parameter; the first one is embed"),
        ({"freeze_regex": "."}, r"^--freeze_parameters_regex \.: every parameter is frozen, nothing is left to train"),
        ({"ratio": 0.95, "freeze": ("head",)}, "^--freeze_parameters_ratio 0.95, --freeze_parameters head: every"),
    ],
)
def test_refused(part: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Part(**part).frozen(SIZES)


QKV = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]


def test_what_megatron_keeps_in_one_tensor() -> None:
    together = joined(table_for(family_config("llama")))
    assert tuple(QKV) in together
    assert ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight") in together
    assert ("lm_head.weight",) in together
    refuse_torn({*QKV, "lm_head.weight"}, together)
    with pytest.raises(
        ConfigError, match=r"k_proj.weight would be frozen while .*q_proj.weight is trained: add .*or use"
    ):
        refuse_torn({QKV[1]}, together)


def test_the_dry_run_counts_what_is_trained_and_refuses_names() -> None:
    table = table_for(family_config("llama"))
    config = TrainConfig(
        model="m", dataset=("a.jsonl",), train_iters=1, freeze_parameters=("model.layers.1.self_attn",)
    )
    frozen = sum(math.prod(shape) for name, shape in table.hf.items() if ".layers.1.self_attn." in name)
    every = trained_parameters(replace(config, freeze_parameters=()), table)
    assert trained_parameters(config, table) == every - frozen
    with pytest.raises(ConfigError, match="no parameter's name begins so; near"):
        trained_parameters(replace(config, freeze_parameters=("model.layer.1",)), table)
    torn = replace(config, freeze_parameters=(QKV[0],))
    with pytest.raises(ConfigError, match="--backend megatron keeps"):
        trained_parameters(torn, table)
    assert trained_parameters(replace(torn, backend="fsdp"), table) < every
