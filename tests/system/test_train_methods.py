"""PEFT's methods, and LoRA from data, through the command: 6 steps = 3 + 3 bit for bit, export, infer, merge."""

import json
import os
from pathlib import Path

import pytest

from mswift import rundir
from tests.support.commands import command, make_home, mswift, run
from tests.support.runs import log, tensors

ADALORA = '{"total_step": 6, "tinit": 1, "tfinal": 1, "init_r": 4, "target_r": 2}'
FSDP = ["--backend", "fsdp", "--nproc_per_node", "2"]
DDP = ["--backend", "ddp"]
CASES: dict[str, list[str]] = {
    "adalora": [*FSDP, "--packing", "--lora_dropout", "0.1", "--tuner_config", ADALORA],
    "vera": [*DDP, "--torch_dtype", "bfloat16", "--tuner_config", '{"r": 8}', "--save_hf_steps", "6"],
}
FROM_GRADIENTS = ["--init_weights", "lora_ga", "--init_batches", "2", "--packing"]
if os.environ.get("MSWIFT_ALL_FAULTS"):
    CASES |= {
        "lora from gradients": [*FSDP, *FROM_GRADIENTS],
        "lora from inputs": [*DDP, "--init_weights", "eva", "--torch_dtype", "bfloat16"],
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("methods"))


@pytest.mark.parametrize("tuner", CASES)
def test_six_steps_are_three_and_three(home: Path, tmp_path: Path, tuner: str) -> None:
    method = tuner.partition(" ")[0]
    flags = ["--tuner_type", method, *CASES[tuner]]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(command(home, "sft", whole, "--train_iters", "6", *flags))
    started = run(command(home, "sft", halves, "--train_iters", "3", *flags))
    continued = run(command(home, "sft", halves, "--train_iters", "6", *flags))
    assert "continuing after step 3" in continued
    assert ("start      " in started) == ("--init_weights" in flags)
    assert "start      " not in continued
    assert log(halves) == log(whole)
    assert tensors(halves / "checkpoint-6") == tensors(whole / "checkpoint-6")
    losses = [row["loss"] for row in rundir.read_metrics(whole)]
    assert losses[-1] < losses[0]
    mswift("export", "--model", whole, "--output_dir", tmp_path / "adapter")
    if (whole / "hf-6").is_dir():
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (whole / "hf-6" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == method.upper()
    mswift("merge", "--model", home / "model", "--adapters", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    asked = ["--prompt", "say 3", "--max_new_tokens", "8", "--temperature", "0"]
    answers = [
        mswift("infer", "--model", home / "model", "--adapters", tmp_path / "adapter", *asked),
        mswift("infer", "--model", tmp_path / "merged", *asked),
    ]
    assert answers[0].splitlines()[-1] == answers[1].splitlines()[-1]


def test_a_start_from_data_is_made_once(home: Path, tmp_path: Path) -> None:
    flags = ["--tuner_type", "lora", *DDP, *FROM_GRADIENTS]
    begun = run(command(home, "sft", tmp_path, "--train_iters", "1", *flags))
    assert "start      lora_ga: gradients of the weights of 28 linears over 2 global batches\n" in begun
    continued = run(command(home, "sft", tmp_path, "--train_iters", "2", *flags))
    assert "continuing after step 1" in continued
    assert "start      " not in continued


def test_another_method_is_not_a_continuation(home: Path, tmp_path: Path) -> None:
    run(command(home, "sft", tmp_path, "--train_iters", "1", "--backend", "ddp", "--tuner_type", "ia3"))
    again = command(home, "sft", tmp_path, "--train_iters", "2", "--backend", "ddp", "--tuner_type", "hra")
    assert "--tuner_type: the run of this --output_dir has ia3, the command says hra; pass ia3" in run(again, 2)
