"""Promise 3: train 6 = train 3 + resume 3, bit for bit, full and LoRA, in separate processes, from the files alone.

The run that continues is a program with a launcher, the others are forks.

Also: evaluation moves nothing, the samples do not depend on the data-parallel size, and bad starts are refused.
"""

import shutil
from pathlib import Path

import pytest

from mswift import run_lock, rundir
from mswift.tuners.export import export_adapter
from tests.support.commands import command, make_home, run, run_program
from tests.support.runs import log, tensors
from tests.support.tiny import tiny_model, tiny_tokenizer

CASES = {
    "sft-lora-tp2": ("sft", ["--tuner_type", "lora", "--nproc_per_node", "2", "--tensor_model_parallel_size", "2",
                             "--sequence_parallel", "--packing", "--packing_length", "100", "--lora_dropout", "0.1",
                             "--micro_batch_size", "2"]),
    "pt-full-pp2": ("pt", ["--nproc_per_node", "2", "--pipeline_model_parallel_size", "2", "--micro_batch_size", "2",
                           "--packing", "--packing_strategy", "concat-and-split"]),
    "sft-full-dp2-bf16": ("sft", ["--nproc_per_node", "2", "--torch_dtype", "bfloat16"]),
}  # fmt: skip
MORE = {
    "pt-rows-cp2": ("pt", ["--nproc_per_node", "2", "--context_parallel_size", "2", "--packing",
                           "--packing_strategy", "concat-and-split"]),
    "sft-lora-dp2": ("sft", ["--nproc_per_node", "2", "--packing", "--packing_length", "100", "--tuner_type", "lora",
                             "--lora_dropout", "0.1", "--micro_batch_size", "2"]),
    "sft-plain-tp2": ("sft", ["--tuner_type", "lora", "--nproc_per_node", "2", "--tensor_model_parallel_size", "2"]),
    "pt-plain-pp2": ("pt", ["--nproc_per_node", "2", "--pipeline_model_parallel_size", "2"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("resume"))


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.whole) for case in MORE)])
def test_six_steps_are_three_and_three(home: Path, tmp_path: Path, case: str) -> None:
    kind, flags = (CASES | MORE)[case]
    whole, first, moved = tmp_path / "whole", tmp_path / "first", tmp_path / "elsewhere" / "moved"
    run(command(home, kind, whole, *flags, "--train_iters", "6"))
    run(command(home, kind, first, *flags, "--train_iters", "3"))
    moved.parent.mkdir()
    first.rename(moved)
    assert "continuing after step 3" in run_program(command(home, kind, moved, *flags, "--train_iters", "6"))
    assert [row["step"] for row in log(whole)] == [1, 2, 3, 4, 5, 6]
    assert log(moved) == log(whole)
    assert all(row["grad_norm"] > 0 for row in log(whole))
    expected, found = tensors(whole / "checkpoint-6"), tensors(moved / "checkpoint-6")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    third = tensors(moved / "checkpoint-3")  # the partner: the comparison can fail, training moved every weight
    assert all(third[n] != expected[n] for n in expected if n.startswith(("decoder.", "adapter.", "optimizer.exp")))


def test_evaluation_moves_nothing_and_the_layout_does_not_choose_samples(home: Path, tmp_path: Path) -> None:
    plain, evaluated, wide = tmp_path / "plain", tmp_path / "evaluated", tmp_path / "wide"
    run(command(home, "sft", plain, "--train_iters", "4"))
    flags = ["--train_iters", "4", "--eval_steps", "2", "--val_dataset", str(home / "val.jsonl")]
    run(command(home, "sft", evaluated, *flags))
    assert log(evaluated) == log(plain)
    assert tensors(evaluated / "checkpoint-4") == tensors(plain / "checkpoint-4")
    run(command(home, "sft", wide, *flags, "--nproc_per_node", "2", "--micro_batch_size", "2"))
    for name in ("loss", "eval_loss", "trained_tokens", "consumed_samples"):
        one, two = ([row[name] for row in rundir.read_metrics(path) if name in row] for path in (evaluated, wide))
        assert one == pytest.approx(two, rel=1e-5), name
    assert [row["step"] for row in rundir.read_metrics(evaluated) if "eval_loss" in row] == [2, 4]


def test_save_limit_and_leftovers_of_a_killed_save(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    leftover = rundir.partial_dir(output, 2)
    leftover.mkdir(parents=True)
    rundir.partial_dir(output, 99).mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"half")
    (output / "checkpoint-7").mkdir()  # no COMMIT: not a checkpoint
    run(command(home, "sft", output, "--train_iters", "3", "--save_steps", "1", "--save_total_limit", "2"))
    assert rundir.committed_steps(output) == [2, 3]
    assert list(output.glob(".checkpoint-*")) == []
    for name in ("loss.png", "run.yaml", "metrics.jsonl", "runs"):
        assert (output / name).exists(), name


def test_refused_starts(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    base = command(home, "sft", output, "--train_iters", "2")
    assert "--resume auto" in run([*base, "--resume", "true"], status=2)
    run(base)
    assert "nothing to do: the run is at step 2 and its length is 2 steps" in run(base)
    assert "--resume auto" in run([*base, "--resume", "false"], status=2)
    assert "--seed" in run([*base, "--seed", "7"], status=2)
    packed = run([*base, "--packing"], status=2)
    assert "--packing: the run of this --output_dir has False, the command says True; pass False" in packed
    other = run([*base, "--dataset", str(home / "val.jsonl")], status=2)
    assert "--dataset" in other
    assert "20 samples then, 7 now" in other
    with run_lock.locked(output):
        assert "another run is writing there now" in run(base, status=2)
    tiny_model(tmp_path / "other", seed=1)
    tiny_tokenizer(tmp_path / "other")
    other = run([*base, "--model", str(tmp_path / "other"), "--train_iters", "3"], status=2)
    assert "model.embed_tokens.weight is not that of the model this run was started from" in other
    weights = next(path for path in sorted((output / "checkpoint-2").glob("*.distcp")))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert f"{weights.name} is damaged" in run([*base, "--train_iters", "3"], status=1)
    base = command(home, "sft", tmp_path / "next", "--train_iters", "1", "--model", str(output / "checkpoint-2"))
    assert f"{weights.name} is damaged" in run(base, status=1)


def test_an_adapter_continues_on_its_base_and_with_its_scale_only(home: Path, tmp_path: Path) -> None:
    """What the flags alone do not tell: the adapter that --adapters named, the weights behind the path of --model."""
    first, output = tmp_path / "first", tmp_path / "second"
    shutil.copytree(home / "model", tmp_path / "model")
    flags = ["--tuner_type", "lora", "--model", str(tmp_path / "model"), "--train_iters", "1"]
    run(command(home, "sft", first, *flags, "--lora_alpha", "16"))
    export_adapter(first / "checkpoint-1", tmp_path / "adapter")
    continued = command(home, "sft", output, *flags)
    run([*continued, "--adapters", str(tmp_path / "adapter")])
    text = run([*continued, "--train_iters", "2"], status=2)
    assert "--lora_alpha: the run of this --output_dir has 16, the command means 32" in text
    assert "--tuner_type full" in run(command(home, "sft", output, "--train_iters", "2"), status=2)
    tiny_model(tmp_path / "model", seed=1)  # other weights of the same shapes under the same name
    text = run([*continued, "--adapters", str(tmp_path / "adapter"), "--train_iters", "2"], status=2)
    assert "model.embed_tokens.weight is not that of the model this run was started from" in text


def test_tokens_that_the_model_has_no_row_for_are_refused(home: Path, tmp_path: Path) -> None:
    """With tensor parallelism such a token would be read as a row of zeros, and its loss would mean nothing."""
    tiny_model(tmp_path / "model", vocab_size=258)
    tiny_tokenizer(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--train_iters", "1", "--nproc_per_node", "2"]
    text = run(command(home, "sft", tmp_path / "run", *flags, "--tensor_model_parallel_size", "2"), status=2)
    assert "(id 258), the model has 258 rows (vocab_size)" in text
    tiny_model(tmp_path / "model", vocab_size=259)
    run(command(home, "sft", tmp_path / "run", *flags, "--tensor_model_parallel_size", "2"))
