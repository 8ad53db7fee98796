"""run.jsonl of a run directory: its starts, saves and stops, from which its goodput follows. No torch.

One object a line, `event` and `time` (seconds since 1970) in each:
    start   step it begins after, last_step, world_size, host, pid, SLURM job and restart; starting_seconds from the
            start of the process until it could begin; repeated_steps and repeated_seconds: work of the start before
            that is done again; last_activity: when that one last wrote
    save    step, seconds that the steps waited
    stop    step, reason: finished, the name of a signal, or the first line of an error
A start that was killed has no stop.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mswift import rundir

FINISHED = "finished"


class Ledger:
    """Appends to run.jsonl; a line is flushed whole. A disk that is full loses lines, not the run."""

    def __init__(self, output_dir: Path) -> None:
        self._path = output_dir / rundir.LEDGER

    def start(self, step: int, last_step: int, world_size: int) -> None:
        """This process begins after `step`. Rows of metrics.jsonl after it, which it does again, are dropped."""
        metrics = self._path.with_name(rundir.METRICS)
        last_activity = metrics.stat().st_mtime if metrics.is_file() else None
        repeated = rundir.truncate_metrics(self._path.parent, step)
        began = psutil.Process().create_time()
        slurm = {"slurm_job": "SLURM_JOB_ID", "slurm_restart": "SLURM_RESTART_COUNT"}
        self._add(
            "start",
            step=step,
            last_step=last_step,
            world_size=world_size,
            host=platform.node(),
            pid=os.getpid(),
            **{name: os.environ[variable] for name, variable in slurm.items() if variable in os.environ},
            repeated_steps=len(repeated),
            repeated_seconds=sum(row.get("step_seconds", 0.0) for row in repeated),
            last_activity=last_activity,
            starting_seconds=time.time() - began,
            time=began,
        )

    def saved(self, step: int, seconds: float) -> None:
        """The checkpoint of `step` is published."""
        self._add("save", step=step, seconds=seconds)

    def stop(self, step: int, reason: str) -> None:
        """This process ends in its own words."""
        self._add("stop", step=step, reason=reason)

    @contextmanager
    def failing(self, step: Callable[[], int]) -> Iterator[None]:
        """Note an error that leaves this block, at the step that is told then."""
        try:
            yield
        except BaseException as error:
            said = str(error).strip().split("\n")[0]
            self.stop(step(), f"{type(error).__name__}: {said}" if said else type(error).__name__)
            raise

    def _add(self, event: str, **values: Any) -> None:
        with suppress(OSError):  # what needs the disk says so
            rundir.append_object(self._path, {"event": event, "time": time.time(), **values})


@dataclass(frozen=True)
class Goodput:
    """Where the time of a run went, in seconds: steps that count, saves, steps done twice, starts, the rest of `up`."""

    up: float
    steps: float
    saves: float
    repeated: float
    starting: float
    wall: float
    """Since the first start: `up`, and what it was down in between."""

    @property
    def share(self) -> float:
        """Of the time in which the run was up, that of steps that count."""
        return self.steps / self.up if self.up > 0 else 0.0

    @property
    def wall_share(self) -> float:
        """The same of all time since the first start."""
        return self.steps / self.wall if self.wall > 0 else 0.0


def read_events(output_dir: Path) -> list[dict[str, Any]]:
    """The objects of run.jsonl; torn lines (killed writers) are left out."""
    found = rundir.read_objects(output_dir / rundir.LEDGER)
    return [event for event in found if {"event", "time"} <= event.keys()]


def goodput(events: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], last_seen: float) -> Goodput:
    """Of all starts together; the time between a stop and the next start counts in `wall` alone.

    rows: of metrics.jsonl; last_seen: when the newest start was last known to work.
    """
    up, began, ended = 0.0, None, 0.0
    for event in events:
        if event["event"] == "start":
            if began is not None:  # it was killed
                ended = max(ended, event.get("last_activity") or 0.0)
                up += max(0.0, ended - began)
            began = ended = event["time"]
        elif event["event"] == "stop" and began is not None:
            ended = event["time"]
            up, began = up + ended - began, None
        else:
            ended = event["time"]
    if began is not None:
        up += max(0.0, last_seen - began)
        ended = max(ended, last_seen)
    starts = [event for event in events if event["event"] == "start"]
    return Goodput(
        up,
        sum(row.get("step_seconds", 0.0) for row in rows),
        sum(event["seconds"] for event in events if event["event"] == "save"),
        sum(start.get("repeated_seconds", 0.0) for start in starts),
        sum(start.get("starting_seconds", 0.0) for start in starts),
        ended - starts[0]["time"] if starts else 0.0,
    )
