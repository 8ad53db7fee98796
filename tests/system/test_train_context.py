"""Sequences shared between ranks, through the command: one rank's run, continued bit for bit and at another layout."""

from pathlib import Path

import pytest

from mswift import rundir
from tests.support.commands import command, make_home, run
from tests.support.runs import log, tensors


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("context"))


def test_shared_sequences_are_trained_evaluated_saved_and_continued(home: Path) -> None:
    shared = ["--nproc_per_node", "2", "--context_parallel_size", "2", "--cp_comm_type", "all_gather"]
    val = ["--val_dataset", str(home / "val.jsonl")]
    output = run(command(home, "sft", home / "whole", "--train_iters", "4", *shared, *val))
    assert "2 ranks = TP 1 x CP 2 x PP 1 x DP 1" in output
    run(command(home, "sft", home / "halves", "--train_iters", "2", *shared))
    run(command(home, "sft", home / "halves", "--train_iters", "4", *shared))
    assert log(home / "halves") == log(home / "whole")
    assert tensors(home / "halves" / "checkpoint-4") == tensors(home / "whole" / "checkpoint-4")
    run(command(home, "sft", home / "one", "--train_iters", "2", *val))
    run(command(home, "sft", home / "one", "--train_iters", "4", *shared, *val))
    for name in ("loss", "trained_tokens", "consumed_samples", "tokens", "eval_loss"):
        found, expected = ([row.get(name) for row in rundir.read_metrics(home / run)] for run in ("one", "whole"))
        found, expected = ([value for value in values[-2:] if value is not None] for values in (found, expected))
        assert found == pytest.approx(expected, rel=1e-4)  # Adam turns rounding into steps
        assert found
