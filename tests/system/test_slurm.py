"""`mswift launch slurm` on a real SLURM of two nodes: what is submitted runs, goes on after faults, and ends.

The state after all faults is, bit for bit, that of a run which nothing befell.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mswift.launchers.site import Site
from mswift.launchers.slurm import SlurmJob, render
from tests.support.ranks import ROOT
from tests.support.slurm_cluster import Cluster, skip_without_slurm
from tests.support.slurm_faults import kill_rank
from tests.support.slurm_runs import PATIENCE_SECONDS, Recipe
from tests.unit.test_slurm_script import HOSTILE, KINDS, SITES


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    skip_without_slurm()
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe.make(tmp_path_factory.mktemp("home"), 400, 50)


@pytest.fixture(scope="module")
def whole(recipe: Recipe) -> Path:
    return recipe.undisturbed()


def test_a_run_survives_what_befalls_its_job(cluster: Cluster, recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    """The signal before a time limit, kill -9 of a rank, preemption by a higher partition."""
    run = recipe.submit(cluster, tmp_path / "run", "--job_name", "storm", "--signal_seconds", "60")
    run.wait_for_step(20)
    cluster.client("scancel", "--batch", "--signal=USR1", run.job)  # as SLURM does before the limit
    cluster.wait_for_restart(run.job, 1, PATIENCE_SECONDS)
    assert run.saved == run.step  # nothing is done again
    run.wait_for_step(run.saved + 10, start=1)
    kill_rank(run)
    cluster.wait_for_restart(run.job, 2, PATIENCE_SECONDS)
    run.wait_for_step(run.step + 10, start=2)
    urgent = ("--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    other = cluster.client("sbatch", *urgent).strip()
    cluster.wait_for_restart(run.job, 3, PATIENCE_SECONDS)
    assert run.saved == run.step
    assert cluster.wait_for_end(other, PATIENCE_SECONDS) == "COMPLETED"
    assert run.wait_for_end() == ["COMPLETED"]
    run.assert_survived(whole, 4)
    assert [start["restart"] for start in run.starts()] == [0, 1, 2, 3]
    said = cluster.client(sys.executable, "-m", "mswift.cli.main", "launch", "status", str(run.output))
    assert f"done          {run.output}: the run is finished" in said


FAILS = """
import os, sys
if "mswift.launchers.node" in sys.orig_argv:
    os._exit(1)
"""


def test_a_run_that_does_not_move_gives_up(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "fails").mkdir()
    (tmp_path / "fails" / "sitecustomize.py").write_text(FAILS)
    site = tmp_path / "failing.yaml"
    site.write_text(f"gpus_per_node: 0\ncpus_per_rank: 1\nenvironment: {{PYTHONPATH: '{tmp_path}/fails:{ROOT}'}}\n")
    run = recipe.submit(cluster, tmp_path / "cap", "--max_idle_restarts", "1", "--site", str(site))
    assert run.wait_for_end() == ["FAILED"]
    assert cluster.field(run.job, "Restarts") == "1"
    verdict = run.verdict()
    assert verdict is not None
    assert verdict["why"].startswith("2 starts in a row brought no new checkpoint (still no checkpoint")
    said = cluster.client(sys.executable, "-m", "mswift.cli.main", "launch", "logs", str(run.output))
    assert len(re.findall(r"mswift launch: again: exit status \d+; no new checkpoint in 1 of these starts", said)) == 1
    assert said.count("mswift launch: stop: 2 starts in a row") == 1


def test_a_job_that_slurm_holds_says_how_it_goes_on(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """No node can store the script, so the launch fails; once they can, the remedy that is printed works."""
    spools = [cluster.home / f"spool-{node}" for node in cluster.nodes]
    for spool in spools:
        spool.rename(spool.with_suffix(".away"))
    try:
        run = recipe.submit(cluster, tmp_path / "held", "--train_iters", "2")
        run.wait(lambda: "held" in cluster.client("squeue"), "held job")
        said = cluster.client(sys.executable, "-m", "mswift.cli.main", "launch", "status", str(run.output))
    finally:
        for spool in spools:
            spool.with_suffix(".away").rename(spool)
    assert f"holds it: scontrol release {run.job} lets it go on\n" in said
    cluster.client("scontrol", "release", run.job)
    assert run.wait_for_end() == ["COMPLETED"]


VARIANTS = {
    **{f"site {name}": {"site": site} for name, site in SITES.items() if name != "plain"},
    **{f"kind {name}": change for name, change in KINDS.items() if name != "range"},
    "range": {"nodes": "1-2"},
    "srun": {"ranks": "srun"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_slurm_accepts_the_script(cluster: Cluster, tmp_path: Path, variant: str) -> None:
    values = {"command": "sft", "run_dir": tmp_path, "folder": tmp_path, "name": "a", "nodes": "2", "nproc_per_node": 8}
    change = {**VARIANTS[variant], "time": "30"}
    if variant == "site no GPU":
        change["site"] = Site(gpus_per_node=0, cpus_per_rank=2)  # this cluster has no node n3 to leave out
    script = tmp_path / "job.sbatch"
    script.write_text(render(SlurmJob(**{**values, **change})))  # type: ignore[arg-type]
    assert "to start at" in cluster.client("sbatch", "--test-only", str(script))


def test_hostile_names_reach_slurm_as_they_are(cluster: Cluster, tmp_path: Path) -> None:
    """What sbatch reads of an #SBATCH line, by its own word; nothing of it is run."""
    folder = tmp_path / HOSTILE.replace("%", "").replace("\\", "")
    folder.mkdir()
    site = Site(gpus_per_node=0, cpus_per_rank=1, sbatch=(f"--comment={HOSTILE}",))
    job = SlurmJob(command="sft", run_dir=folder, folder=tmp_path, name=HOSTILE, nodes="1", nproc_per_node=1, site=site)
    (folder / "launch").mkdir()
    (tmp_path / "job.sbatch").write_text(render(job))
    number = cluster.client("sbatch", "--parsable", "--hold", str(tmp_path / "job.sbatch"), cwd=tmp_path).strip()
    shown = cluster.client("scontrol", "show", "job", number)
    cluster.client("scancel", number)
    assert f"JobName={HOSTILE}\n" in shown
    assert f"Comment={HOSTILE}" in shown
    assert f"StdOut={folder}/launch/log-{number}.txt" in shown
    assert list(tmp_path.rglob("owned*")) == []
