"""--streaming: train 4 = train 2 + resume 2, bit for bit, over ends of blocks and epochs; same samples at any DP."""

from pathlib import Path

import pytest

from mswift import rundir
from tests.support.commands import command, make_home, run
from tests.support.runs import log, tensors

FLAGS = ["--streaming", "--streaming_block_rows", "6", "--val_dataset"]
CASES = {
    "mixture": ["--dataset_weights", "3", "1"],
    "packed-dp2": ["--packing", "--packing_length", "100", "--nproc_per_node", "2"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_home(tmp_path_factory.mktemp("streaming"))
    with (home / "val.jsonl").open("a") as stream:
        stream.write('{"query": "no response"}\n')
    return home


def _command(home: Path, output: Path, *flags: str) -> list[str]:
    both = ["--dataset", str(home / "chat.jsonl"), str(home / "val.jsonl")]
    return command(home, "sft", output, *both, *FLAGS, str(home / "chat.jsonl"), *flags)


@pytest.mark.parametrize("case", CASES)
def test_four_steps_are_two_and_two(home: Path, tmp_path: Path, case: str) -> None:
    whole, parts, flags = tmp_path / "whole", tmp_path / "parts", CASES[case]
    run(_command(home, whole, *flags, "--train_iters", "4"))
    run(_command(home, parts, *flags, "--train_iters", "2"))
    assert "continuing after step 2" in run(_command(home, parts, *flags, "--train_iters", "4"))
    assert [row["step"] for row in log(whole)] == [1, 2, 3, 4]
    assert log(parts) == log(whole)
    assert log(whole)[-1]["epoch"] >= 1
    assert tensors(parts / "checkpoint-4") == tensors(whole / "checkpoint-4")
    assert list((home / "cache" / "streams").iterdir()) == []
    for path in (parts, whole):
        (line,) = (path / rundir.REJECTED).read_text().splitlines()
        assert '"row": 8' in line


def test_the_layout_chooses_no_samples_and_other_files_are_refused(home: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    data = tmp_path / "data.jsonl"
    data.write_bytes((home / "chat.jsonl").read_bytes())
    base = ["--dataset", str(data), "--streaming", "--streaming_block_rows", "6", "--train_iters"]
    run(command(home, "sft", one, *base, "3"))
    run(command(home, "sft", two, *base, "3", "--nproc_per_node", "2", "--micro_batch_size", "2"))
    for name in ("loss", "trained_tokens", "consumed_samples", "epoch"):
        found = [[row[name] for row in rundir.read_metrics(path)] for path in (one, two)]
        assert found[0] == pytest.approx(found[1], rel=1e-5), name
    data.write_text(data.read_text().replace("say 7", "say 8"))
    text = run(command(home, "sft", one, *base, "4"), status=2)
    assert "--dataset: the streamed files (names in their order, sizes, contents)" in text
    text = run(command(home, "sft", one, *base, "4", "--streaming_block_rows", "7"), status=2)
    assert "--streaming_block_rows: the run of this --output_dir has 6, the command says 7; pass 6" in text
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"- path: {data}\n  epochs: 2\n")
    text = run(command(home, "sft", tmp_path / "three", "--dataset", str(mixture), *base[2:], "1"), status=2)
    assert "gives epochs, which need the number of samples, and --streaming does not count them" in text
