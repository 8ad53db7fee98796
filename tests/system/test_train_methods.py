"""PEFT's methods beside LoRA through the command: 6 steps = 3 + 3 bit for bit, export, infer, merge."""

import json
from pathlib import Path

import pytest

from mswift import rundir
from tests.support.commands import command, make_home, mswift, run
from tests.support.runs import log, tensors

ADALORA = '{"total_step": 6, "tinit": 1, "tfinal": 1, "init_r": 4, "target_r": 2}'
FSDP = ["--backend", "fsdp", "--nproc_per_node", "2"]
CASES: dict[str, list[str]] = {
    "adalora": [*FSDP, "--packing", "--lora_dropout", "0.1", "--tuner_config", ADALORA],
    "vera": ["--backend", "ddp", "--torch_dtype", "bfloat16", "--tuner_config", '{"r": 8}', "--save_hf_steps", "6"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("methods"))


@pytest.mark.parametrize("tuner", CASES)
def test_six_steps_are_three_and_three(home: Path, tmp_path: Path, tuner: str) -> None:
    flags = ["--tuner_type", tuner, *CASES[tuner]]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(command(home, "sft", whole, "--train_iters", "6", *flags))
    run(command(home, "sft", halves, "--train_iters", "3", *flags))
    assert "continuing after step 3" in run(command(home, "sft", halves, "--train_iters", "6", *flags))
    assert log(halves) == log(whole)
    assert tensors(halves / "checkpoint-6") == tensors(whole / "checkpoint-6")
    losses = [row["loss"] for row in rundir.read_metrics(whole)]
    assert losses[-1] < losses[0]
    mswift("export", "--model", whole, "--output_dir", tmp_path / "adapter")
    if (whole / "hf-6").is_dir():
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (whole / "hf-6" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == tuner.upper()
    mswift("merge", "--model", home / "model", "--adapters", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    asked = ["--prompt", "say 3", "--max_new_tokens", "8", "--temperature", "0"]
    answers = [
        mswift("infer", "--model", home / "model", "--adapters", tmp_path / "adapter", *asked),
        mswift("infer", "--model", tmp_path / "merged", *asked),
    ]
    assert answers[0].splitlines()[-1] == answers[1].splitlines()[-1]


def test_another_method_is_not_a_continuation(home: Path, tmp_path: Path) -> None:
    run(command(home, "sft", tmp_path, "--train_iters", "1", "--backend", "ddp", "--tuner_type", "ia3"))
    again = command(home, "sft", tmp_path, "--train_iters", "2", "--backend", "ddp", "--tuner_type", "hra")
    assert "--tuner_type: the run of this --output_dir has ia3, the command says hra; pass ia3" in run(again, 2)
