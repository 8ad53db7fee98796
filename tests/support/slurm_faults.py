"""What befalls a job of a test cluster: one fault at a time, and storms of them, timed."""

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.support.slurm_runs import SlurmRun


@dataclass(frozen=True)
class Recovery:
    """A fault, and what it cost."""

    name: str
    repeated_steps: int
    seconds_to_start: float
    """From the fault until the job's script began again."""
    seconds_to_step: float
    """From the fault until the next step was written down."""

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.repeated_steps} steps again, {self.seconds_to_start:.1f} s until the job began again, "
            f"{self.seconds_to_step:.1f} s until its next step"
        )


@dataclass(frozen=True)
class Fault:
    """does: at once; is_told: the run hears of it before, and saves; is_silent: the ranks wait until they time out."""

    does: Callable[[SlurmRun], object]
    is_told: bool = False
    is_silent: bool = False


def requeue(run: SlurmRun) -> None:
    """Somebody puts the job back into the queue."""
    run.cluster.client("scontrol", "requeue", run.job)


def kill_rank(run: SlurmRun) -> None:
    """As the kernel does when memory is out."""
    run.kill(run.nodes[1], signal.SIGKILL)


def node_back(run: SlurmRun) -> None:
    """A node starts anew within seconds, so that SLURM does not notice."""
    run.cluster.kill_node(run.nodes[1])
    time.sleep(3)
    run.cluster.start_node(run.nodes[1])


def lose_node(run: SlurmRun) -> None:
    """A node dies and stays away."""
    run.cluster.kill_node(run.nodes[1])


def lose_batch_host(run: SlurmRun) -> None:
    """The node dies on which the batch script and rank 0 run."""
    run.cluster.kill_node(run.nodes[0])


def cut_link(run: SlurmRun) -> None:
    """A node works on, and nobody can reach it."""
    run.cluster.cut(run.nodes[1])


def cut_batch_host(run: SlurmRun) -> None:
    """The same, where the batch script and rank 0 run: they hold the run directory while the job starts elsewhere."""
    run.cluster.cut(run.nodes[0])


def hang(run: SlurmRun) -> None:
    """A rank stands still, and the others wait for it in a collective."""
    run.kill(run.nodes[1], signal.SIGUSR2)


FAULTS = {
    "requeue": Fault(requeue, is_told=True),
    "kill_rank": Fault(kill_rank),
    "node_back": Fault(node_back),
    "lose_node": Fault(lose_node),
    "lose_batch_host": Fault(lose_batch_host),
    "cut_link": Fault(cut_link, is_silent=True),
    "cut_batch_host": Fault(cut_batch_host, is_silent=True),
    "hang": Fault(hang, is_silent=True),
}


def befall(run: SlurmRun, name: str) -> Recovery:
    """Let a fault befall a run between two saves; return when it has done a step again, with all nodes mended."""
    run.wait_for_step(run.saved + run.recipe.save_steps // 4)
    number, began = len(run.events("start")), time.time()
    FAULTS[name].does(run)
    run.wait(lambda: len(run.events("start")) > number, f"start after {name}")
    run.wait(lambda: run.step > run.events("start")[-1]["step"], f"step after {name}")
    start = run.starts()[-1]["time"] - began
    found = Recovery(name, run.events("start")[-1]["repeated_steps"], start, time.time() - began)
    print(found, flush=True)
    run.cluster.mend()
    away = set(run.cluster.nodes) - set(run.nodes)
    # as a site's health check does: a job that meets its own past on a node is held ("Duplicate jobid")
    past = "end of the past of the lost node"
    run.wait(lambda: not any(run.cluster.processes(node, "") for node in away), past, beyond_its_end=True)
    return found


def storm(run: SlurmRun, seconds: float, every: float) -> list[Recovery]:
    """All kinds of faults in turn, one each `every` seconds by the clock, whatever a machine takes to recover.

    A fault that is due while the last one still costs time comes once that is over. The last one has its time, too.
    """
    run.wait_for_step(1)
    began, found = time.monotonic(), list[Recovery]()

    def until(moment: float) -> None:
        run.wait(lambda: time.monotonic() > moment, "pause", moment)

    while (due := (len(found) + 1) * every) < seconds:
        until(began + due)
        found.append(befall(run, list(FAULTS)[len(found) % len(FAULTS)]))
    until(began + seconds)
    return found


def cancel(run: SlurmRun) -> None:
    """mswift launch cancel, and the end of all its processes."""
    said = run.cluster.client(sys.executable, "-m", "mswift.cli.main", "launch", "cancel", str(run.output))
    assert said == f"cancelled {' '.join(run.jobs)}\n"
    run.wait(lambda: all(run.state(job) in ("CANCELLED", "COMPLETED", "FAILED") for job in run.jobs), "cancellation")
    run.wait(lambda: not any(run.cluster.processes(node, "mswift") for node in run.cluster.nodes), "silence")
