"""`mswift launch slurm` on a real SLURM of two nodes: what is submitted runs, goes on after faults, and ends.

The state after all faults is, bit for bit, that of a run which nothing befell.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mswift import rundir
from mswift.launchers.site import Site
from mswift.launchers.slurm import SlurmJob, render
from tests.support.commands import command, make_home, run
from tests.support.ranks import ROOT
from tests.support.runs import log, tensors
from tests.support.slurm_cluster import Cluster, skip_without_slurm
from tests.unit.test_slurm_script import HOSTILE, KINDS, SITES

STEPS = 400
PATIENCE_SECONDS = 500  # a busy machine is no failure
FLAGS = ("--train_iters", str(STEPS), "--lr_decay_iters", str(STEPS), "--tensorboard", "false", "--save_steps", "50",
         "--micro_batch_size", "4", "--save_total_limit", "2", "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    skip_without_slurm()
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_home(tmp_path_factory.mktemp("home"))
    (path / "site.yaml").write_text("gpus_per_node: 0\ncpus_per_rank: 1\n")
    (path / "recipe.yaml").write_text("command: sft\n")
    return path


def launch(cluster: Cluster, home: Path, output: Path, *flags: str, site: str = "site.yaml") -> list[str]:
    """Submit on both nodes, a rank each; the numbers of the jobs."""
    words = command(home, "sft", output, *FLAGS)
    argv = [*words[:3], "launch", "slurm", str(home / "recipe.yaml"), *words[4:], "--site", str(home / site)]
    said = cluster.client(*argv, "--nodes", "2", "--signal_seconds", "60", *flags)
    return said.splitlines()[0].removeprefix("submitted ").split(":")[0].split()


def newest_step(output: Path) -> int:
    rows = rundir.read_metrics(output)
    return rows[-1]["step"] if rows else 0


def wait_for_step(cluster: Cluster, job: str, output: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while newest_step(output) < step:
        assert time.monotonic() < deadline, last_words(output)
        assert cluster.field(job, "JobState") not in ("FAILED", "COMPLETED", "CANCELLED"), last_words(output)
        time.sleep(0.2)


def last_words(output: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted((output / "launch").glob("log-*.txt")))


def verdict(output: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((output / "launch" / "end.json").read_text())
    return found


def assert_same_end(output: Path, whole: Path) -> None:
    """Metrics and every tensor of the last checkpoint are those of the run that nothing befell."""
    assert log(output) == log(whole)
    expected, found = (tensors(path / f"checkpoint-{STEPS}") for path in (whole, output))
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    output = home / "whole"
    run([*command(home, "sft", output, *FLAGS), "--nproc_per_node", "2"])
    return output


def test_a_run_survives_what_befalls_its_job(cluster: Cluster, home: Path, whole: Path) -> None:
    """The signal before a time limit, kill -9 of a rank, preemption by a higher partition."""
    output = home / "storm"
    (job,) = launch(cluster, home, output, "--preflight", "false", "--job_name", "storm")
    wait_for_step(cluster, job, output, 20)
    cluster.client("scancel", "--batch", "--signal=USR1", job)  # as SLURM does before the limit
    cluster.wait_for_restart(job, 1, PATIENCE_SECONDS)
    saved = newest_step(output)
    assert rundir.committed_steps(output)[-1] == saved  # nothing is done again
    wait_for_step(cluster, job, output, saved + 10)
    (*_, rank) = cluster.processes("n2", "mswift.cli.main")
    os.kill(rank, signal.SIGKILL)
    cluster.wait_for_restart(job, 2, PATIENCE_SECONDS)
    wait_for_step(cluster, job, output, newest_step(output) + 10)
    urgent = ("--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    other = cluster.client("sbatch", *urgent).strip()
    cluster.wait_for_restart(job, 3, PATIENCE_SECONDS)
    assert rundir.committed_steps(output)[-1] == newest_step(output)
    assert cluster.wait_for_end(other, PATIENCE_SECONDS) == "COMPLETED"
    assert cluster.wait_for_end(job, PATIENCE_SECONDS) == "COMPLETED", last_words(output)
    assert verdict(output) == {
        "verdict": "done",
        "why": f"the run is finished; its newest checkpoint is checkpoint-{STEPS}",
    }
    assert_same_end(output, whole)
    starts = [json.loads(line) for line in (output / "launch" / "starts.jsonl").read_text().splitlines()]
    assert [start["restart"] for start in starts] == [0, 1, 2, 3]
    said = cluster.client(sys.executable, "-m", "mswift.cli.main", "launch", "status", str(output))
    assert f"done          {output}: the run is finished" in said


FAILS = """
import os, sys
if "mswift.launchers.node" in sys.orig_argv:
    os._exit(1)
"""


def test_a_run_that_does_not_move_gives_up(cluster: Cluster, home: Path) -> None:
    (home / "fails").mkdir()
    (home / "fails" / "sitecustomize.py").write_text(FAILS)
    site = f"gpus_per_node: 0\ncpus_per_rank: 1\nenvironment: {{PYTHONPATH: '{home}/fails:{ROOT}'}}\n"
    (home / "failing.yaml").write_text(site)
    flags = ("--max_idle_restarts", "1", "--preflight", "false")
    (job,) = launch(cluster, home, home / "cap", *flags, site="failing.yaml")
    assert cluster.wait_for_end(job, PATIENCE_SECONDS) == "FAILED"
    assert cluster.field(job, "Restarts") == "1"
    assert verdict(home / "cap")["why"].startswith("2 starts in a row brought no new checkpoint (still no checkpoint")
    said = cluster.client(sys.executable, "-m", "mswift.cli.main", "launch", "logs", str(home / "cap"))
    assert len(re.findall(r"mswift launch: again: exit status \d+; no new checkpoint in 1 of these starts", said)) == 1
    assert said.count("mswift launch: stop: 2 starts in a row") == 1


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
