"""--backend fsdp and ddp, through the command: 6 steps = 3 + 3 bit for bit, and runs that change their engine."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mswift import rundir
from mswift.config.optimizers import LIBRARIES
from tests.support.commands import command, make_home, mswift, run, run_program
from tests.support.runs import log, tensors
from tests.support.server import ENVIRON

AGAIN = ["--recompute_granularity", "full", "--recompute_method", "uniform", "--recompute_num_layers", "1"]
CASES: dict[str, tuple[str, list[str]]] = {
    "cut, packed": ("sft", ["--backend", "fsdp", "--nproc_per_node", "2", "--packing", "--packing_length", "128"]),
    "lora, one process": ("sft", ["--backend", "ddp", "--tuner_type", "lora", "--neftune_noise_alpha", "5"]),
    "a part, packed": ("sft", ["--backend", "fsdp", "--nproc_per_node", "2", "--packing", "--freeze_parameters_ratio",
                               "0.5", "--neftune_noise_alpha", "5", "--torch_dtype", "bfloat16"]),
}  # fmt: skip
MORE: dict[str, tuple[str, list[str]]] = {
    "ring": ("pt", ["--backend", "fsdp", "--nproc_per_node", "2", "--sequence_parallel_size", "2",
                    "--cross_entropy_loss_fusion", "true"]),
    "whole matrices, in host memory": ("sft", ["--backend", "fsdp", "--nproc_per_node", "2", "--optimizer", "muon",
                                               "--fsdp_cpu_offload", "--recompute_granularity", "selective"]),
    "copies, bfloat16": ("sft", ["--backend", "ddp", "--nproc_per_node", "2", "--torch_dtype", "bfloat16", *AGAIN]),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.whole) for case in MORE)])
def test_six_steps_are_three_and_three(home: Path, tmp_path: Path, case: str) -> None:
    kind, flags = (CASES | MORE)[case]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    said = run(command(home, kind, whole, "--train_iters", "6", *flags))
    assert "transformers' model" in said
    assert "pip install" not in said  # advice of a library that PEFT imports
    run(command(home, kind, halves, "--train_iters", "3", *flags))
    assert "continuing after step 3" in run(command(home, kind, halves, "--train_iters", "6", *flags))
    assert log(halves) == log(whole)
    assert tensors(halves / "checkpoint-6") == tensors(whole / "checkpoint-6")


MEGATRON = ["--nproc_per_node", "2", "--tensor_model_parallel_size", "2", "--sequence_parallel"]
FSDP = ["--backend", "fsdp", "--nproc_per_node", "2"]


PART = ["--freeze_parameters", "model.embed_tokens", "--freeze_parameters_regex", r"layers\.0\.(self_attn|mlp)"]


@pytest.mark.parametrize("tuner", [PART, ["--tuner_type", "lora"]], ids=["part", "lora"])
def test_runs_that_change_their_engine_go_on_as_if_they_had_not(home: Path, tmp_path: Path, tuner: Any) -> None:
    losses = {}
    for name, first, second in (("stays", MEGATRON, MEGATRON), ("to", MEGATRON, FSDP), ("from", FSDP, MEGATRON)):
        output = tmp_path / name
        run(command(home, "sft", output, "--train_iters", "3", *first, *tuner))
        run(command(home, "sft", output, "--train_iters", "6", *second, *tuner))
        losses[name] = [row["loss"] for row in rundir.read_metrics(output)]
    assert losses["to"] == pytest.approx(losses["stays"], rel=1e-5)
    assert losses["from"] == pytest.approx(losses["stays"], rel=1e-5)


ACROSS = [pytest.param(name, marks=pytest.mark.whole if name != "muon" else ())
          for name in ("muon", "adafactor", "adamw_8bit", "galore", "q_galore", "apollo", "lion")]  # fmt: skip


@pytest.mark.parametrize("optimizer", ACROSS)
def test_state_goes_on_at_another_number_of_ranks(home: Path, tmp_path: Path, optimizer: str) -> None:
    """State of whole matrices and of rows: two ranks begin, one goes on, as two would have."""
    flags = ["--backend", "fsdp", "--optimizer", optimizer.removeprefix("q_"), "--lr", "3e-3"]
    if optimizer in LIBRARIES:
        pytest.importorskip(LIBRARIES[optimizer], reason="pip install 'mswift[optim]'")
    if optimizer in ("galore", "q_galore", "apollo"):
        flags += ["--galore_rank", "8", "--galore_update_proj_gap", "4"]
    if optimizer == "q_galore":
        flags += ["--galore_quantization", "true"]
    losses = {}
    for name, second in (("stays", ["--nproc_per_node", "2"]), ("alone", [])):
        run(command(home, "sft", tmp_path / name, "--train_iters", "3", *flags, "--nproc_per_node", "2"))
        run(command(home, "sft", tmp_path / name, "--train_iters", "6", *flags, *second))
        losses[name] = [row["loss"] for row in rundir.read_metrics(tmp_path / name)]
    # muon multiplies in bfloat16, adamw_8bit rounds its state: what differs by rounding may differ by a whole step
    loose = {"muon": 1e-4, "adamw_8bit": 1e-4, "q_galore": 1e-4}
    assert losses["alone"] == pytest.approx(losses["stays"], rel=loose.get(optimizer, 1e-5))
    assert losses["alone"][5] < losses["alone"][0]


@pytest.mark.whole
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_train_alike(home: Path, tmp_path: Path) -> None:
    losses = []
    for name, flags in (("plain", []), ("compiled", ["--torch_compile"])):
        run_program(command(home, "sft", tmp_path / name, "--train_iters", "2", *FSDP, *flags), env=ENVIRON)
        losses.append([row["loss"] for row in rundir.read_metrics(tmp_path / name)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1] != losses[0]


def test_the_export_of_a_run_is_transformers_model(home: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    run(command(home, "sft", tmp_path / "run", "--train_iters", "2", "--save_hf_steps", "2", *FSDP))
    mswift("export", "--model", tmp_path / "run", "--output_dir", tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    snapshot = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf-2").state_dict()
    assert exported.keys() == snapshot.keys()
    assert all(torch.equal(exported[name], snapshot[name]) for name in exported)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "qwen3"
