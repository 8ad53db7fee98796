"""run.jsonl of a run directory: its starts, saves and stops, from which its goodput follows. No torch.

One object a line, `event` and `time` (seconds since 1970) in each:
    start   step it begins after, last_step, world_size, host, pid, SLURM job and restart; repeated_steps and
            repeated_seconds: work of the start before that is done again; last_activity: when that one last wrote
    save    step, seconds that the steps waited
    stop    step, reason: finished, the name of a signal, or the first line of an error
A start that was killed has no stop.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
            time=psutil.Process().create_time(),
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
        line = json.dumps({"event": event, "time": time.time(), **values}) + "\n"
        try:
            with self._path.open("a+b") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        line = "\n" + line  # after a line that a kill left torn
                file.write(line.encode())
        except OSError:
            pass  # what needs the disk says so


@dataclass(frozen=True)
class Goodput:
    """Where the time of a run went, in seconds: steps that count, saves, steps done twice, the rest of `up`."""

    up: float
    steps: float
    saves: float
    repeated: float

    @property
    def share(self) -> float:
        """Of the time in which the run was up, that of steps that count."""
        return self.steps / self.up if self.up > 0 else 0.0


def read_events(output_dir: Path) -> list[dict[str, Any]]:
    """The objects of run.jsonl; torn lines (killed writers) are left out."""
    path, events = output_dir / rundir.LEDGER, []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and {"event", "time"} <= event.keys():
            events.append(event)
    return events


def goodput(events: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], last_seen: float) -> Goodput:
    """Of all starts together; the time between a stop and the next start does not count.

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
            up, began = up + event["time"] - began, None
        else:
            ended = event["time"]
    if began is not None:
        up += max(0.0, last_seen - began)
    return Goodput(
        up,
        sum(row.get("step_seconds", 0.0) for row in rows),
        sum(event["seconds"] for event in events if event["event"] == "save"),
        sum(event.get("repeated_seconds", 0.0) for event in events if event["event"] == "start"),
    )
