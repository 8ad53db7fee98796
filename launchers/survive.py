"""What a job of `mswift launch slurm` asks before and after its ranks: go on, done, once more, or give up.

The run directory decides, not an exit status that SLURM sees: run_dir/launch holds `starts.jsonl` (a line for each
start: job, restart, the newest checkpoint then) and, once nothing more is to be done, `end.json`, which later jobs of
a chain and restarted ones obey.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mswift import rundir
from mswift.launchers import preflight

STARTS, END, LIMITS = "starts.jsonl", "end.json", "limits.json"
DONE, AGAIN, GIVEN_UP = 10, 75, 1
_WRONG_COMMAND = 2


@dataclass(frozen=True)
class Limits:
    """Of one job: starts again, and starts in a row without a new checkpoint."""

    max_restarts: int
    max_idle_restarts: int


@dataclass(frozen=True)
class Verdict:
    """done: nothing is left to do; again: the same command goes on; stop: a person has to look."""

    verdict: Literal["done", "again", "stop"]
    why: str


def judge(
    status: int, starts: Sequence[dict[str, Any]], newest: int | None, limits: Limits, refused: Sequence[str] = ()
) -> Verdict:
    """What follows when the ranks ended with `status`; `newest` is the step of the newest checkpoint now.

    starts: of this run, the one that has just ended last; `newest` in each is the newest checkpoint when it began.
    refused: what the preflight or a rank of the command said, whatever status srun made of it.
    """
    if refused:
        more = f" (and {len(refused) - 1} more, in the log)" if len(refused) > 1 else ""
        return Verdict("stop", f"refused: {refused[0]}{more}")
    if status == 0:
        return Verdict("done", f"the run is finished; its newest checkpoint is {_name(newest)}")
    if status == _WRONG_COMMAND:
        return Verdict("stop", "the command is refused (exit status 2), and would be again: the log says why")
    if (limit := reached(starts, starts[-1]["restart"] + 1, newest, limits)) is not None:
        return limit
    idle = _idle_starts(starts, newest)
    moved = f"went on to {_name(newest)}" if idle == 0 else f"no new checkpoint in {idle} of these starts"
    return Verdict("again", f"exit status {status}; {moved}")


def reached(starts: Sequence[dict[str, Any]], restart: int, newest: int | None, limits: Limits) -> Verdict | None:
    """The limit that forbids start number `restart` (0: the job's first) after `starts`, or None."""
    if restart > limits.max_restarts:
        return Verdict(
            "stop",
            f"the job was started {restart} times, which is all that --max_restarts {limits.max_restarts} allows; the "
            f"newest checkpoint is {_name(newest)}: submit again to go on",
        )
    idle = _idle_starts(starts, newest)
    if idle <= limits.max_idle_restarts:
        return None
    return Verdict(
        "stop",
        f"{idle} starts in a row brought no new checkpoint (still {_name(newest)}; --max_idle_restarts "
        f"{limits.max_idle_restarts}): the log says why; if steps were done, use a smaller --save_steps; submit again",
    )


def _idle_starts(starts: Sequence[dict[str, Any]], newest: int | None) -> int:
    """How many of the last starts left the newest checkpoint where it was."""
    idle = 0
    for start in reversed(starts):
        if start["newest"] != newest:
            break
        idle += 1
    return idle


def _name(step: int | None) -> str:
    return "no checkpoint" if step is None else f"checkpoint-{step}"


def begin(run_dir: Path) -> int:
    """Note a start; 0 where the ranks are to be started, DONE or GIVEN_UP where an earlier job said the last word."""
    launch = run_dir / rundir.LAUNCH
    if (launch / END).is_file():
        end = json.loads((launch / END).read_text())
        print(f"mswift launch: {end['why']}", flush=True)
        return DONE if end["verdict"] == "done" else GIVEN_UP
    (launch / preflight.REFUSED).unlink(missing_ok=True)
    newest, (job, restart) = _newest(run_dir), _this_start()
    if (limit := reached(rundir.read_objects(launch / STARTS), restart, newest, _limits(launch))) is not None:
        return _say(launch, limit)
    start = {
        "time": time.time(),
        "job": job,
        "restart": restart,
        "nodes": os.environ.get("SLURM_JOB_NODELIST", ""),
        "newest": newest,
    }
    try:
        rundir.append_object(launch / STARTS, start)
    except OSError as error:
        why = f"{launch} cannot be written ({error.strerror}): make it writable or free some space; submit again"
        return _say(launch, Verdict("stop", why))
    return 0


def end(run_dir: Path, status: int) -> int:
    """Judge, say it, note a last word; 0 done, AGAIN or GIVEN_UP.

    A script on a node that was cut off may come here when SLURM has long started the job elsewhere: it would queue that
    start again.
    """
    launch = run_dir / rundir.LAUNCH
    refused = preflight.read_refusals(launch)
    starts = rundir.read_objects(launch / STARTS)
    if (starts[-1]["job"], starts[-1]["restart"]) != _this_start():
        print(f"mswift launch: the run has gone on elsewhere, on {starts[-1].get('nodes')}", flush=True)
        return GIVEN_UP
    return _say(launch, judge(status, starts, _newest(run_dir), _limits(launch), refused))


def _this_start() -> tuple[str, int]:
    """SLURM's number of this job, and how often it was started before."""
    return os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _say(launch: Path, verdict: Verdict) -> int:
    print(f"mswift launch: {verdict.verdict}: {verdict.why}", flush=True)
    if verdict.verdict != "again":
        try:
            rundir.write_json(launch / END, {"verdict": verdict.verdict, "why": verdict.why})
        except OSError as error:
            print(f"mswift launch: {launch / END} cannot be written ({error.strerror})", flush=True)
    return {"done": 0, "again": AGAIN, "stop": GIVEN_UP}[verdict.verdict]


def _limits(launch: Path) -> Limits:
    return Limits(**json.loads((launch / LIMITS).read_text()))


def _newest(run_dir: Path) -> int | None:
    steps = rundir.committed_steps(run_dir)
    return steps[-1] if steps else None


def main(argv: Sequence[str]) -> int:
    """begin RUN_DIR, or end RUN_DIR --status N."""
    parser = argparse.ArgumentParser(prog="mswift.launchers.survive")
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--status", type=int, default=0)
    given = parser.parse_args(argv)
    return begin(given.run_dir) if given.moment == "begin" else end(given.run_dir, given.status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
