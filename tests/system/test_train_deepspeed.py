"""--backend deepspeed through the command: 6 steps = 3 + 3 bit for bit, at another number of ranks, other engines."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from mswift import rundir
from tests.support.commands import command, make_home, mswift, run
from tests.support.runs import log, tensors

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'mswift[deepspeed]'"
)

DEEPSPEED = ["--backend", "deepspeed", "--nproc_per_node", "2"]
CASES: dict[str, tuple[str, list[str]]] = {
    "zero2, packed, bfloat16": (
        "sft",
        [*DEEPSPEED, "--packing", "--packing_length", "128", "--torch_dtype", "bfloat16"],
    ),
    "zero3, lora": ("sft", [*DEEPSPEED, "--deepspeed", "zero3", "--tuner_type", "lora", "--lora_dropout", "0.1"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.whole
@pytest.mark.parametrize("case", CASES)
def test_six_steps_are_three_and_three(home: Path, tmp_path: Path, case: str) -> None:
    kind, flags = CASES[case]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert "DeepSpeed ZeRO-" in run(command(home, kind, whole, "--train_iters", "6", *flags))
    run(command(home, kind, halves, "--train_iters", "3", *flags))
    assert "continuing after step 3" in run(command(home, kind, halves, "--train_iters", "6", *flags))
    assert log(halves) == log(whole)
    assert tensors(halves / "checkpoint-6") == tensors(whole / "checkpoint-6")


FSDP = ["--backend", "fsdp", "--nproc_per_node", "2"]
MEGATRON = ["--nproc_per_node", "2", "--tensor_model_parallel_size", "2", "--sequence_parallel"]


@pytest.mark.parametrize(
    "tuner",
    [pytest.param([], id="full"), pytest.param(["--tuner_type", "lora"], id="lora", marks=pytest.mark.whole)],
)
def test_a_run_goes_from_engine_to_engine_as_if_it_had_stayed(home: Path, tmp_path: Path, tuner: list[str]) -> None:
    run(command(home, "sft", tmp_path / "stays", "--train_iters", "6", *DEEPSPEED, *tuner))
    for steps, flags in ((2, DEEPSPEED), (3, FSDP), (4, MEGATRON), (6, ["--backend", "deepspeed"])):
        run(command(home, "sft", tmp_path / "moves", "--train_iters", str(steps), *flags, *tuner))
    stays, moves = ([row["loss"] for row in rundir.read_metrics(tmp_path / name)] for name in ("stays", "moves"))
    assert moves == pytest.approx(stays, rel=1e-5)
    mswift("export", "--model", tmp_path / "moves", "--output_dir", tmp_path / "hf")
    kind = "adapter_config" if tuner else "config"
    assert json.loads((tmp_path / "hf" / f"{kind}.json").read_text())


@pytest.mark.whole
def test_a_file_is_deepspeeds_own(home: Path, tmp_path: Path) -> None:
    """What a file says is what DeepSpeed does, and a file that disagrees with a flag starts nothing."""
    own = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5000}, "gradient_clipping": "auto"}
    (tmp_path / "own.json").write_text(json.dumps(own))
    flags = [*DEEPSPEED, "--deepspeed", str(tmp_path / "own.json"), "--train_iters", "2"]
    assert "DeepSpeed ZeRO-1" in run(command(home, "sft", tmp_path / "run", *flags))
    (tmp_path / "own.json").write_text(json.dumps(own | {"train_batch_size": 4}))
    refused = run(command(home, "sft", tmp_path / "other", *flags), status=2)
    assert 'train_batch_size 4, but --global_batch_size means 8: use "auto" there' in refused
