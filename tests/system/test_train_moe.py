"""A mixture of experts through the commands: trained with its experts shared, continued otherwise, exported."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mswift import rundir
from tests.support.commands import command, make_home, mswift, run, run_program
from tests.support.family_configs import family_config
from tests.support.parity import model_of

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GLM-4.5-like model whose correction bias is not bf16's to hold."""
    path = make_home(tmp_path_factory.mktemp("moe"))
    model = model_of(family_config("glm4_moe", vocab_size=300, num_hidden_layers=2, max_position_embeddings=256))
    model.get_buffer(BIAS).copy_(torch.linspace(-0.3, 0.3, 8))
    model.save_pretrained(path / "model")  # type: ignore[operator]
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory."""
    from safetensors.torch import load_file

    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def test_experts_are_trained_saved_continued_at_another_layout_and_exported(home: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.system.test_train_road import loss_by_transformers

    val = ["--val_dataset", str(home / "val.jsonl")]
    shared = ["--nproc_per_node", "2", "--expert_model_parallel_size", "2"]
    output = run(command(home, "sft", home / "run", "--train_iters", "2", *shared, *val))
    assert "2 ranks = TP 1 x PP 1 x DP 2; experts ETP 1 x EP 2 x EDP 1" in output
    cut = ["--nproc_per_node", "2", "--tensor_model_parallel_size", "2", "--sequence_parallel"]
    run(command(home, "sft", home / "run", "--train_iters", "4", *cut, *val))
    whole = run(command(home, "sft", home / "whole", "--train_iters", "4", *val))
    assert "1 ranks = TP 1 x PP 1 x DP 1" in whole
    losses, expected = ([row["loss"] for row in rundir.read_metrics(home / name)] for name in ("run", "whole"))
    assert losses == pytest.approx(expected, rel=1e-4)  # Adam turns rounding into steps
    mswift("export", "--model", home / "run", "--output_dir", home / "hf")
    mswift("verify", home / "run", home / "hf")
    assert (home / "hf" / "config.json").read_bytes() == (home / "model" / "config.json").read_bytes()
    start, end = tensors(home / "model"), tensors(home / "hf")
    assert start.keys() == end.keys()
    assert [name for name in start if torch.equal(start[name], end[name])] == [BIAS]
    model = AutoModelForCausalLM.from_pretrained(home / "hf", dtype=torch.float32)
    found = loss_by_transformers(model, AutoTokenizer.from_pretrained(home / "hf"), home / "val.jsonl")
    assert found == pytest.approx(rundir.read_metrics(home / "run")[-1]["eval_loss"], rel=1e-5)


def test_bf16_keeps_the_correction_bias_in_fp32(home: Path) -> None:
    flags = ["--train_iters", "1", "--torch_dtype", "bfloat16", "--nproc_per_node", "2"]
    run(command(home, "sft", home / "bf16", *flags, "--expert_model_parallel_size", "2"))
    mswift("export", "--model", home / "bf16", "--output_dir", home / "bf16-hf")
    start, end = tensors(home / "model"), tensors(home / "bf16-hf")
    assert torch.equal(start[BIAS], end[BIAS])
    assert {name: value.dtype for name, value in end.items() if value.dtype != torch.bfloat16} == {BIAS: torch.float32}
    mswift("convert", "--model", home / "bf16-hf", "--to", "megatron", "--output_dir", home / "megatron")
    argv = command(home, "sft", home / "again", *flags)
    argv[argv.index(str(home / "model"))] = str(home / "megatron")
    run(argv)
    assert np.isfinite(rundir.read_metrics(home / "again")[0]["loss"])


def test_what_cannot_be_laid_out_is_refused_with_the_remedy(home: Path) -> None:
    base = [sys.executable, "-m", "mswift.cli.main", "sft", "--model", str(home / "model"), "--train_iters", "1"]
    base += ["--dataset", str(home / "chat.jsonl"), "--output_dir", str(home / "never")]
    output = run_program([*base, "--nproc_per_node", "2", "--tensor_model_parallel_size", "2"], status=2)
    assert "add --sequence_parallel true" in output
    output = run_program([*base, "--nproc_per_node", "3", "--expert_model_parallel_size", "3"], status=2)
    assert "--expert_model_parallel_size 3 does not divide the model's 8 experts: it can be 1, 2, 4, 8" in output
    output = run_program([*base, "--tuner_type", "lora", "--use_dora"], status=2)
    assert "--use_dora with --target_parameters down_proj gate.weight gate_up_proj: PEFT has no such" in output
