"""Faults that befall a job on a real SLURM: nodes, links, its own SLURM, its disk, its ranks; and storms of them.

The state after each is, bit for bit, that of a run which nothing befell, and no fault costs more steps than the save
interval has. MSWIFT_ALL_FAULTS=1 runs each fault alone and a storm of 15 minutes; else a few of them befall one run.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mswift import rundir
from mswift.status import read_status
from tests.support.slurm_cluster import Cluster, skip_without_slurm
from tests.support.slurm_faults import FAULTS, befall, cancel, kill_rank, storm
from tests.support.slurm_runs import Recipe, SlurmRun

EVERYTHING = os.environ.get("MSWIFT_ALL_FAULTS") == "1"
everything = pytest.mark.skipif(not EVERYTHING, reason="takes long: MSWIFT_ALL_FAULTS=1 runs it")
STEPS, SAVE_STEPS = 200, 20
STORM_SECONDS, STORM_EVERY_SECONDS = 900.0, 90.0
HANG_SECONDS = 15


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 24 MiB; mounted before the nodes start, since later mounts are not theirs."""
    skip_without_slurm()
    path = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "mswift-test", path], check=True)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm"), num_nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe.make(tmp_path_factory.mktemp("home"), STEPS, SAVE_STEPS)


@pytest.fixture(scope="module")
def whole(recipe: Recipe) -> Path:
    return recipe.undisturbed()


@everything
@pytest.mark.parametrize("name", [name for name in FAULTS if name != "hang"])
def test_a_run_survives(cluster: Cluster, recipe: Recipe, whole: Path, tmp_path: Path, name: str) -> None:
    minutes = {"cut_link": "0.5", "cut_batch_host": "2"}.get(name, "30")
    run = recipe.submit(cluster, tmp_path / "run", "--distributed_timeout_minutes", minutes)
    befall(run, name)
    run.wait_for_end()
    run.assert_survived(whole, 2)
    if name == "cut_batch_host":
        assert "waiting for an earlier start of this job to end: pid " in run.said()
    if FAULTS[name].is_told:
        assert run.events("start")[-1]["repeated_steps"] == 0  # it saved before it went


def assert_good(run: SlurmRun, num_faults: int, *, starts_count: bool) -> None:
    """Goodput, as `mswift status` prints it, is 90 % of what the save interval allows."""
    print(run.cluster.client(sys.executable, "-m", "mswift.cli.main", "status", str(run.output), check=False))
    good, allowed = read_status(run.output).goodput, run.allowed_goodput(num_faults)
    share = good.share if starts_count else good.steps / (good.up - good.starting)
    print(f"goodput {share:.1%}{'' if starts_count else ' without starts'}, the save interval allows {allowed:.1%}")
    assert share >= 0.9 * allowed


@everything
def test_a_short_storm(cluster: Cluster, recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    names = ["requeue", "node_back"]
    run = recipe.submit(cluster, tmp_path / "run")
    for name in names:
        befall(run, name)
    run.wait_for_end()
    run.assert_survived(whole, 1 + len(names))
    assert_good(run, len(names), starts_count=False)


@everything
def test_a_storm_of_15_minutes(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """With steps of a fraction of a second, beside which what a step writes down is little."""
    long = Recipe(recipe.home, 1_000_000, 50, ("--global_batch_size", "64"))
    run = long.submit(cluster, tmp_path / "run", "--distributed_timeout_minutes", "0.25")
    faults = len(storm(run, STORM_SECONDS, STORM_EVERY_SECONDS))
    cancel(run)
    assert_good(run, faults, starts_count=True)
    rows = rundir.read_metrics(run.output)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert max(start["repeated_steps"] for start in run.events("start")) <= long.save_steps


# -- cancelling, chains, signals


def test_a_cancelled_run_has_saved_and_a_chain_ends_it(
    cluster: Cluster, recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    """mswift launch cancel; then three jobs: one is told to stop before anybody listens, one loses a rank, one ends."""
    output = tmp_path / "run"
    run = recipe.submit(cluster, output)
    run.wait_for_step(SAVE_STEPS + 5)
    cancel(run)
    assert run.state() == "CANCELLED"
    assert run.saved == run.step
    run = recipe.submit(cluster, output, "--chain", "3", "--requeue", "false")
    first, _, third = run.jobs
    assert run.state(first) == "RUNNING" or run.state(first) == "PENDING"
    assert run.state(third) == "PENDING"
    run.wait(lambda: run.cluster.processes("n1", "mswift.parallel.agent") != [], "agent")
    cluster.client("scancel", "--batch", "--signal=USR1", first)  # as SLURM does before the limit
    run.wait(lambda: run.state(first) == "FAILED", "end of the first job")
    assert [event["reason"] for event in run.events("stop")][-1] == "SIGUSR1"
    run.wait_for_step(run.saved + 5, start=2)
    kill_rank(run)
    assert run.wait_for_end() == ["FAILED", "FAILED", "COMPLETED"]
    run.assert_survived(whole, 4)


@everything
def test_signals_while_a_run_ends(cluster: Cluster, recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    """From its last steps on srun, agents and ranks are told to stop over and over: what is done counts."""
    run = recipe.submit(cluster, tmp_path / "run")
    run.wait_for_step(STEPS - 5)
    told = 0
    while run.verdict() is None:
        for node in ("n1", "n2"):
            for pid in cluster.processes(node, "mswift.cli.main"):
                try:
                    os.kill(pid, signal.SIGUSR1)
                    told += run.step == STEPS
                except ProcessLookupError:
                    pass
    run.wait_for_end()
    assert told > 10
    run.assert_survived(whole)
    assert "ended by SIGUSR1" not in run.said()


@everything
def test_the_limit_of_slurm_itself(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """The real signal of a real limit of two minutes; nothing is done again."""
    long = Recipe(recipe.home, 1_000_000, 200)
    run = long.submit(cluster, tmp_path / "run", "--time", "2", "--signal_seconds", "30")
    run.wait_for_step(1)
    run.wait(lambda: len(run.events("stop")) == 1, "stop before the limit")
    assert run.events("stop")[0]["reason"] == "SIGUSR1"
    run.wait_for_step(run.saved + 1, start=1)
    assert run.events("start")[1]["repeated_steps"] == 0
    cancel(run)


# -- a rank that hangs, a disk that is full


@everything  # tests/system/test_faults.py hangs a rank without SLURM
def test_a_rank_hangs_in_a_job(cluster: Cluster, recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    """The others wait in a collective: stacks and collectives of all ranks are there, and the job goes on."""
    minutes = str(HANG_SECONDS / 60)
    run = recipe.submit(cluster, tmp_path / "run", "--distributed_timeout_minutes", minutes)
    befall(run, "hang")
    run.wait_for_end()
    run.assert_survived(whole, 2)
    assert f"no progress for {HANG_SECONDS} s (--distributed_timeout_minutes {HANG_SECONDS / 60:g}): " in run.said()
    assert re.search(r"the others wait for rank 1 \(pid \d+ on n2; step \d+, ", run.said())
    (folder,) = run.output.glob("hang-*")
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"flight-rank-{rank}.json" for rank in range(2)), *(f"rank-{rank}.txt" for rank in range(2))
    ]  # fmt: skip
    assert "sitecustomize.py" in (folder / "rank-1.txt").read_text()
    collectives = json.loads((folder / "flight-rank-0.json").read_bytes())["entries"]
    assert collectives[-1]["profiling_name"].startswith("gloo:")
    assert not collectives[-1]["retired"]


@everything
def test_the_disk_is_full_during_a_save(
    cluster: Cluster, recipe: Recipe, whole: Path, disk: Path, tmp_path: Path
) -> None:
    run = recipe.submit(cluster, disk / "run")
    run.wait_for_step(SAVE_STEPS + 5)
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
    run.wait(lambda: "No space left" in run.said() or "disk is full" in run.said(), "full disk")
    ballast.unlink()
    run.wait_for_end()
    run.assert_survived(whole)
