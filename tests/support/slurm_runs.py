"""Runs that `mswift launch slurm` submits to a cluster of tests, watched by what they write."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mswift import rundir
from mswift.ledger import read_events
from mswift.status import read_status
from tests.support.commands import PROGRAM, command, make_home, run
from tests.support.ranks import ROOT
from tests.support.runs import log, tensors
from tests.support.slurm_cluster import ENDED, Cluster

PATIENCE_SECONDS = 500  # a busy machine is no failure
HANGS = """
import signal, time
signal.signal(signal.SIGUSR2, lambda number, frame: time.sleep(3600))
"""
"""Of every process of a run: SIGUSR2 makes it hang, while its threads go on."""


@dataclass(frozen=True)
class Recipe:
    """What a group of runs trains: a tiny model, two data-parallel ranks, on one cluster."""

    home: Path
    num_steps: int
    save_steps: int
    flags: tuple[str, ...] = ()

    @classmethod
    def make(cls, home: Path, num_steps: int, save_steps: int, *flags: str) -> "Recipe":
        """Model, data, recipe and site file in `home`."""
        make_home(home)
        (home / "hangs").mkdir()
        (home / "hangs" / "sitecustomize.py").write_text(HANGS)
        path = f"environment: {{PYTHONPATH: '{home}/hangs:{ROOT}'}}\n"
        (home / "site.yaml").write_text(f"gpus_per_node: 0\ncpus_per_rank: 1\n{path}")
        (home / "recipe.yaml").write_text("command: sft\n")
        return cls(home, num_steps, save_steps, flags)

    def command(self, output: Path) -> list[str]:
        """The training command."""
        steps = str(self.num_steps)
        return command(self.home, "sft", output, "--train_iters", steps, "--lr_decay_iters", steps, "--lr", "1e-3",
                       "--tensorboard", "false", "--save_steps", str(self.save_steps), "--micro_batch_size", "4",
                       "--save_total_limit", "2", "--device", "cpu", *self.flags)  # fmt: skip

    def undisturbed(self) -> Path:
        """The directory of a run that nothing befell."""
        output = self.home / "whole"
        run([*self.command(output), "--nproc_per_node", "2"])
        return output

    def submission(self, output: Path, *flags: str) -> list[str]:
        """The command that submits a run on two nodes, a rank each."""
        argv = [*PROGRAM, "launch", "slurm", str(self.home / "recipe.yaml"), *self.command(output)[4:]]
        site = ("--site", str(self.home / "site.yaml"))
        return [*argv, *site, "--nodes", "2", "--signal_seconds", "20", "--preflight", "false", *flags]

    def submit(self, cluster: Cluster, output: Path, *flags: str) -> "SlurmRun":
        """Submit it."""
        said = cluster.client(*self.submission(output, *flags))
        jobs = said.splitlines()[0].removeprefix("submitted ").split(":")[0].split()
        return SlurmRun(cluster, self, output, jobs)


@dataclass
class SlurmRun:
    """A submitted run."""

    cluster: Cluster
    recipe: Recipe
    output: Path
    jobs: list[str]

    @property
    def job(self) -> str:
        """The first, or only, job."""
        return self.jobs[0]

    @property
    def step(self) -> int:
        """The newest step that is written down."""
        path = self.output / rundir.METRICS
        if not path.is_file():
            return 0
        with path.open("rb") as file:  # of a long run only the end
            file.seek(-min(path.stat().st_size, 10_000), os.SEEK_END)
            *lines, _ = file.read().split(b"\n")
        return int(json.loads(lines[-1])["step"]) if lines else 0

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint."""
        return max(rundir.committed_steps(self.output), default=0)

    def events(self, event: str) -> list[dict[str, Any]]:
        """Of the ledger."""
        return [found for found in read_events(self.output) if found["event"] == event]

    def starts(self) -> list[dict[str, Any]]:
        """What the jobs noted when they began."""
        path = self.output / "launch" / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def said(self) -> str:
        """All logs, of the jobs and of their ranks."""
        paths = [*sorted(self.output.glob("launch/log-*")), *sorted(self.output.glob("logs/*/rank-*"))]
        return "\n".join(path.read_text(errors="replace") for path in paths)

    def verdict(self) -> dict[str, str] | None:
        """The last word of the run."""
        path = self.output / "launch" / "end.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def state(self, job: str | None = None) -> str:
        """Of a job, as SLURM calls it."""
        return self.cluster.field(job or self.job, "JobState")

    def wait(
        self, reached: Callable[[], bool], what: str, deadline: float = 0.0, *, beyond_its_end: bool = False
    ) -> None:
        """Until `reached`; a failure with the end of the logs where it is not, or where the run has its last word.

        beyond_its_end: that word is no reason to stop waiting.
        """
        deadline = max(deadline, time.monotonic()) + PATIENCE_SECONDS
        while not reached():
            if time.monotonic() > deadline or (self.verdict() is not None and not beyond_its_end):
                if reached():
                    return
                pytest.fail(f"no {what}; {self.verdict()}; {self.cluster.client('squeue')}; {self.said()[-6000:]}")
            time.sleep(0.1)

    def wait_for_step(self, step: int, *, start: int | None = None) -> None:
        """Until a step is written down; start: by the ranks' start of this number (0: the first)."""
        number = -1 if start is None else start
        self.wait(lambda: len(self.events("start")) > number and self.step >= step, f"step {step} of start {number}")

    def wait_for_end(self) -> list[str]:
        """The states of the jobs once all have ended."""
        self.wait(lambda: all(self.state(job) in ENDED for job in self.jobs) or self.verdict() is not None, "end")
        return [self.cluster.wait_for_end(job, PATIENCE_SECONDS) for job in self.jobs]

    @property
    def nodes(self) -> list[str]:
        """Of the job that runs now, or ran last; the batch host, with rank 0, first."""
        running = next((job for job in self.jobs if self.state(job) == "RUNNING"), self.jobs[-1])
        return self.cluster.client("scontrol", "show", "hostnames", self.cluster.field(running, "NodeList")).split()

    def assert_survived(self, whole: Path, num_starts: int | None = None) -> None:
        """As if nothing had befallen it, and no fault cost more steps than the save interval."""
        steps = self.recipe.num_steps
        assert self.verdict() == {
            "verdict": "done", "why": f"the run is finished; its newest checkpoint is checkpoint-{steps}"
        }, self.said()[-6000:]  # fmt: skip
        assert log(self.output) == log(whole)
        expected, found = (tensors(path / f"checkpoint-{steps}") for path in (whole, self.output))
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
        starts = self.events("start")
        assert max(start["repeated_steps"] for start in starts) <= self.recipe.save_steps, starts
        assert num_starts is None or len(starts) == num_starts, starts

    def allowed_goodput(self, num_faults: int) -> float:
        """What the save interval allows: saves take time, and each fault may cost the steps between two of them."""
        good = read_status(self.output).goodput
        lost = num_faults * self.recipe.save_steps * good.steps / max(1, self.step)
        return good.steps / (good.steps + good.saves + lost)

    def kill(self, node: str, number: int) -> int:
        """A signal to the rank of a node, which is not the agent above it; its number on this machine."""
        (*_, rank) = self.cluster.processes(node, "-u -m mswift.cli.main")
        os.kill(rank, number)
        return rank
