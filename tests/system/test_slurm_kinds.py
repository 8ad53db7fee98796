"""What else `mswift launch slurm` submits, on a real SLURM of two nodes, and what is refused there.

Ranks by srun that go on with fewer nodes, a sweep, a chain that is cancelled, a node that lacks a file.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from mswift import rundir
from tests.support.commands import PROGRAM
from tests.support.runs import log, tensors
from tests.support.slurm_cluster import Cluster, skip_without_slurm
from tests.support.slurm_runs import Recipe

STEPS, SAVED = 300, 50


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    skip_without_slurm()
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe.make(tmp_path_factory.mktemp("home"), STEPS, SAVED, "--save_total_limit", "20")


def launch(cluster: Cluster, action: str, output: Path) -> tuple[int, str]:
    """Exit status of `mswift launch status`, `logs` or `cancel` of a run, and what it says."""
    argv = [*PROGRAM, "launch", action, str(output)]
    done = subprocess.run(
        argv, env=cluster.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout


def test_ranks_by_srun_are_torchruns_and_go_on_with_fewer_nodes(
    cluster: Cluster, recipe: Recipe, tmp_path: Path
) -> None:
    """A rank is a task of srun on each of two nodes; then only one of "1-2" is left, and the samples stay the same."""
    whole = recipe.undisturbed()
    run = recipe.submit(cluster, tmp_path / "run", "--ranks", "srun", "--nodes", "1-2", "--preflight", "true")
    run.wait_for_step(SAVED + 5)
    cluster.client("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    cluster.client("scancel", "--batch", "--signal=USR1", run.job)
    cluster.wait_for_restart(run.job, 1, 500)
    before = run.saved
    assert run.wait_for_end() == ["COMPLETED"], run.said()
    cluster.client("scontrol", "update", "nodename=n2", "state=resume")
    assert [start["nodes"] for start in run.starts()] == ["n[1-2]", "n1"]
    assert [start["world_size"] for start in run.events("start")] == [2, 1]
    assert "preflight: 2 ranks on 2 nodes, cpu, all_reduce" in run.said()
    assert "preflight: 1 ranks on 1 nodes, cpu, " in run.said()
    expected, found = log(whole), log(run.output)
    assert found[:before] == expected[:before]
    first = rundir.checkpoint_dir(run.output, SAVED), rundir.checkpoint_dir(whole, SAVED)
    assert tensors(first[0]) == tensors(first[1])
    for row, same in zip(found, expected, strict=True):
        for name in ("step", "lr", "trained_tokens", "tokens", "consumed_samples"):
            assert row[name] == same[name]
    for row, same in zip(found[before : before + 5], expected[before : before + 5], strict=True):
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-5)  # summed in another order, which grows with time


def test_a_node_that_lacks_a_file_is_named_and_nothing_is_trained(
    cluster: Cluster, recipe: Recipe, tmp_path: Path
) -> None:
    """The nodes share all files here but those in /dev/shm: one lies where it is submitted and on n1, not on n2."""
    rows = Path("/dev/shm") / f"{uuid4()}.jsonl"
    rows.write_bytes((recipe.home / "chat.jsonl").read_bytes())
    try:
        copy = ("srun", "--nodes=1", "--nodelist=n1", "cp", str(recipe.home / "chat.jsonl"), str(rows))
        cluster.client(*copy)
        run = recipe.submit(cluster, tmp_path / "run", "--preflight", "true", "--dataset", str(rows))
        assert run.wait_for_end() == ["FAILED"], run.said()
    finally:
        rows.unlink()
    why = f"node n2: {rows} cannot be read (No such file or directory): put it where all nodes see it"
    assert [line.startswith(f"refused: {why}") for line in run.said().splitlines() if "refused: " in line[:9]] == [True]
    status, said = launch(cluster, "status", run.output)
    assert status == 1
    assert f"stop          {run.output}: refused: {why}" in said
    assert (cluster.field(run.job, "Restarts"), run.events("start")) == ("0", [])


def test_a_command_that_both_ranks_refuse_is_not_tried_again(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """The data goes once the job is submitted; srun may report a rank that it ended (143), not the refusal (2)."""
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((recipe.home / "chat.jsonl").read_bytes())
    run = recipe.submit(cluster, tmp_path / "run", "--dataset", str(rows))
    rows.unlink()
    assert run.wait_for_end() == ["FAILED"], run.said()
    last = run.verdict()
    assert last is not None
    assert re.match(rf"refused: .*{rows}", last["why"])
    assert (cluster.field(run.job, "Restarts"), run.events("start")) == ("0", [])


def test_a_sweep_runs_as_an_array(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """Two values, a node each at the same time; each has its own directory, log and end."""
    sweep = recipe.submit(cluster, tmp_path / "sweep", "--nodes", "1", "--sweep", "seed=7,8", "--train_iters", "3")
    points = [replace(sweep, output=sweep.output / str(number)) for number in range(2)]
    for number, point in enumerate(points):
        point.wait(lambda point=point: point.verdict() is not None, f"end of point {number}")  # type: ignore[misc]
        assert point.step == 3
        assert f"seed: {7 + number}\n" in (point.output / "run.yaml").read_text()
    status, said = launch(cluster, "status", sweep.output)
    assert status == 0
    assert said.count("done          ") == 2
    assert log(points[0].output) != log(points[1].output)
    status, said = launch(cluster, "logs", sweep.output)
    assert [f"log-{sweep.job}_{number}.txt" in said for number in range(2)] == [True, True]


def test_a_chain_is_seen_and_cancelled(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    chain = recipe.submit(cluster, tmp_path / "chain", "--chain", "3")
    chain.wait(lambda: chain.state() == "RUNNING", "first job of the chain")
    _, said = launch(cluster, "status", chain.output)
    assert [line.split()[:3] for line in said.splitlines()] == [
        ["job", number, "RUNNING" if number == chain.job else "PENDING"] for number in chain.jobs
    ]
    assert said.count("(Dependency)") == 2
    refusal = cluster.client(*recipe.submission(chain.output), check=False)
    assert f"its job {chain.job} is RUNNING: wait for its end, or mswift launch cancel {chain.output}" in refusal
    assert launch(cluster, "cancel", chain.output) == (0, f"cancelled {' '.join(chain.jobs)}\n")
    assert [cluster.wait_for_end(job, 200) for job in chain.jobs] == ["CANCELLED"] * 3
    assert launch(cluster, "cancel", chain.output) == (0, "nothing to cancel: no job of this run is in the queue\n")
    status, said = launch(cluster, "status", chain.output)
    assert (status, said.count("is no longer in the queue")) == (0, 3)
