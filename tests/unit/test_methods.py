"""PEFT's methods beside LoRA: counts by the published formulas, fields and names that are refused. No torch."""

import json
from math import prod, sqrt
from pathlib import Path
from typing import Any, get_args

import pytest

from mswift.cli.main import main
from mswift.config.train import SftConfig, TrainConfig, TunerType
from mswift.converters.plan import ModelTable, table_for
from mswift.errors import ConfigError
from mswift.train.trained import trained_parameters
from mswift.tuners.hidden import HIDDEN
from mswift.tuners.method import MethodConfig, parse_method
from mswift.tuners.methods import METHODS
from mswift.tuners.prompts import PROMPTS
from tests.support.family_configs import family_config

QWEN_7B = family_config("qwen") | {
    "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
    "kv_channels": 128, "vocab_size": 151936,
}  # fmt: skip
"""Shapes of Qwen-7B: per layer c_attn 4096 -> 12288, c_proj 4096 -> 4096, w1 and w2 4096 -> 11008, c_proj back."""
LINEARS = ((4096, 12288), (4096, 4096), (4096, 11008), (4096, 11008), (11008, 4096))
"""(inputs, outputs)."""


def total(each: Any) -> int:
    return 32 * sum(each(i, o) for i, o in LINEARS)


def square_root(n: int) -> tuple[int, int]:
    small = max(m for m in range(1, int(sqrt(n)) + 1) if n % m == 0)
    return small, n // small


FORMULAS: dict[str, tuple[dict[str, Any], int]] = {
    "adalora": ({}, total(lambda i, o: 12 * (i + o + 1))),
    "ia3": ({}, total(lambda i, o: i if i == 11008 else o)),
    "vera": ({}, total(lambda i, o: o + 256)),
    "boft": ({}, total(lambda i, o: (i // 4) * 4 * 4 + o)),
    "oft": ({}, total(lambda i, o: (i // 32) * 32 * 31 // 2)),
    "fourierft": ({}, total(lambda i, o: 1000)),
    "loha": ({}, total(lambda i, o: 2 * 8 * (i + o))),
    "lokr": (
        {},
        total(lambda i, o: square_root(o)[0] * square_root(i)[0] + 8 * (square_root(o)[1] + square_root(i)[1])),
    ),
    "hra": ({}, total(lambda i, o: 8 * i)),
    "vblora": ({}, total(lambda i, o: 4 * 256 * (i + o) // 256) + 256 * 256),
    "miss": ({}, total(lambda i, o: 64 * o)),
}
"""Method -> (fields, trained parameters of Qwen-7B as its paper counts them)."""


def qwen_7b() -> ModelTable:
    return table_for(QWEN_7B)


def config(tuner: str, **values: Any) -> SftConfig:
    return SftConfig(model="m", backend="ddp", tuner_type=tuner, train_iters=10, **values)  # type: ignore[arg-type]


def test_lora_and_dora_of_qwen_7b_have_the_published_sizes() -> None:
    lora = config("lora", lora_rank=8)
    assert trained_parameters(lora, qwen_7b()) == 17_891_328  # 17.8913 M
    dora = config("lora", lora_rank=8, use_dora=True)
    assert trained_parameters(dora, qwen_7b()) == 19_251_200  # 19.2512 M


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_qwen_7b_has_the_size_of_its_formula(name: str) -> None:
    fields, wanted = FORMULAS[name]
    text = json.dumps(fields) if fields else None
    assert trained_parameters(config(name, tuner_config=text), qwen_7b()) == wanted


def test_flags_and_table_name_the_same_methods() -> None:
    others = [config(name) for name in get_args(TunerType)]
    assert {c.tuner_type for c in others if c.trains_adapter and not c.trains_lora} == {
        *METHODS,
        *HIDDEN,
        *PROMPTS,
        "xlora",
    }
    flags = {flag for method in METHODS.values() for flag in method.flags}
    assert flags <= set(TrainConfig.__dataclass_fields__)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown field": (
        "oft",
        {"tuner_config": '{"oft_blok_size": 8}'},
        "no field 'oft_blok_size'; near: oft_block_size",
    ),
    "no JSON": ("oft", {"tuner_config": "{oft_block_size: 8}"}, "no JSON"),
    "no object": ("oft", {"tuner_config": "[8]"}, "a JSON object"),
    "type": ("hra", {"tuner_config": '{"r": "8"}'}, "r '8' must be a whole number"),
    "a bool is no number": ("hra", {"tuner_config": '{"r": true}'}, "must be a whole number"),
    "rank 0": ("hra", {"tuner_config": '{"r": 0}'}, "r 0 must be at least 1"),
    "blocks": ("oft", {"tuner_config": '{"r": 8}'}, "give one of them and 0 for the other"),
    "block size": ("oft", {"tuner_config": '{"oft_block_size": 7}'}, "7 does not divide the 32 inputs of .*q_proj"),
    "vectors": ("vblora", {}, "vector_length 256 does not divide the 32 inputs"),
    "frequencies": ("fourierft", {"tuner_config": '{"n_frequency": 999999}'}, "more than the"),
    "MiSS rank": ("miss", {}, "r 64 is more than the 32 inputs"),
    "AdaLoRA ranks": ("adalora", {"lora_rank": 12}, "target_r 12 must be below init_r 12"),
    "AdaLoRA steps": ("adalora", {"tuner_config": '{"tinit": 6, "tfinal": 4}'}, "that is no step; lower tinit"),
    "dropout": ("miss", {"lora_dropout": 1.0, "tuner_config": '{"r": 4}'}, "miss_dropout 1.0 must be .* below 1"),
    "feed-forward": ("ia3", {"tuner_config": '{"feedforward_modules": ["q_prj"]}'}, "has 'q_prj', which is not among"),
    "twice": ("loha", {"lora_rank": 4, "tuner_config": '{"r": 8}'}, "--lora_rank 4 and r 8 of --tuner_config"),
    "flag of LoRA": ("vera", {"use_dora": True}, "--use_dora True has no effect with --tuner_type vera"),
    "rank of VeRA": ("vera", {"lora_rank": 64}, "--lora_rank 64 has no effect .* --tuner_config takes r "),
    "module": ("hra", {"target_modules": ("q_prj",)}, "no such module; nearest: q_proj"),
    "embedding": ("hra", {"target_modules": ("lm_head",)}, "--modules_to_save lm_head"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_method_does_not_take_is_refused(case: str) -> None:
    tuner, values, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        trained_parameters(config(tuner, **values), table_for(family_config("llama")))


def test_experts_take_lora_only() -> None:
    with pytest.raises(ConfigError, match="gate_proj: these are experts or routers, which PEFT adapts by LoRA only"):
        trained_parameters(config("hra", target_modules=("gate_proj",)), table_for(family_config("qwen3_moe")))


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_is_read_as_it_is_written(name: str) -> None:
    small = {
        "oft": {"oft_block_size": 8},
        "vblora": {"vector_length": 8},
        "miss": {"r": 4},
        "fourierft": {"n_frequency": 9},
    }
    table = table_for(family_config("llama"))
    own = MethodConfig.for_table(
        table, name, target_modules=("q_proj", "down_proj"), fields=small.get(name, {}), seed=3
    )
    again, saved = parse_method(json.loads(own.text(table, (), "base")), Path("adapter_config.json"), seed=3)
    assert (again, saved) == (own, ())
    assert sum(map(prod, again.shapes(table).values())) >= sum(map(prod, own.trained_shapes(table).values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "POLY"}, "peft_type='POLY'; mswift reads LORA ADALORA"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"coft": True}, "coft=True is not supported by mswift for OFT"),
        ({"target_modules": ".*proj"}, "must be a list of module names"),
    ],
)
def test_a_file_that_means_more_is_refused(change: dict[str, Any], message: str) -> None:
    table = table_for(family_config("llama"))
    own = MethodConfig.for_table(table, "oft", target_modules=("q_proj",), fields={"oft_block_size": 8})
    with pytest.raises(ConfigError, match=message):
        parse_method(own.content(table) | change, Path("adapter_config.json"))


def test_the_dry_run_says_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(family_config("llama")))
    (tmp_path / "data.jsonl").write_text('{"query": "a", "response": "b"}\n')
    argv = ["sft", "--dry_run", "--model", str(tmp_path), "--dataset", str(tmp_path / "data.jsonl")]
    argv += ["--train_iters", "3", "--tuner_type", "hra", "--output_dir", str(tmp_path / "out")]
    assert main([*argv, "--backend", "fsdp"]) == 0
    said = capsys.readouterr().out
    table = table_for(family_config("llama"))
    trained = MethodConfig.for_table(table, "hra", target_modules=("all-linear",), fields={}).trained_shapes(table)
    assert "tuner          hra, on all-linear" in said
    assert f"{sum(map(prod, trained.values())):,}" in said
    assert main(argv) == 2
    assert "--tuner_type hra is computed by PEFT on transformers' model: use --backend fsdp" in capsys.readouterr().out
