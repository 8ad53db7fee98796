"""Runs whose pipeline is cut otherwise on each side of a resume are the run of one rank."""

from pathlib import Path

import pytest
import yaml

from mswift import rundir
from tests.support.commands import command, make_home, mswift, run


def test_a_run_goes_on_under_another_cut(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    run(command(home, "sft", home / "one", "--train_iters", "6"))
    stages = ["--nproc_per_node", "2", "--pipeline_model_parallel_size", "2"]
    flags = ["--virtual_pipeline_model_parallel_size", "2", "--recompute_granularity", "selective"]
    said = run(command(home, "sft", home / "cut", "--train_iters", "2", *stages, *flags))
    assert "stage 0  embedding, layer 0 | layer 2" in said
    flags = ["--pipeline_model_parallel_layout", "Ettt|tL", "--mcore.batch_p2p_sync", "false"]
    run(command(home, "sft", home / "cut", "--train_iters", "4", *stages, *flags))
    assert yaml.safe_load((home / "cut" / rundir.CONFIG).read_text())["mcore"] == {"batch_p2p_sync": False}
    flags = ["--nproc_per_node", "2", "--overlap_grad_reduce", "--overlap_param_gather"]
    run(command(home, "sft", home / "cut", "--train_iters", "6", *flags))
    losses = [[step["loss"] for step in rundir.read_metrics(home / name)] for name in ("one", "cut")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    mswift("export", "--model", home / "cut", "--output_dir", home / "exported")
    assert (home / "exported" / "config.json").read_bytes() == (home / "model" / "config.json").read_bytes()
