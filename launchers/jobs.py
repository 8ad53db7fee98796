"""The jobs of a run on a SLURM cluster: submit them, and ask for them by the run's directory."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mswift import rundir
from mswift.config.loader import save_yaml
from mswift.config.train import TrainConfig
from mswift.errors import ConfigError, MswiftError
from mswift.launchers.preflight import EXPECTED, Expected, write
from mswift.launchers.slurm import SlurmJob
from mswift.launchers.survive import END, LIMITS, STARTS, Limits

JOBS, RECIPE = rundir.JOBS, "recipe.yaml"
_PATIENCE_SECONDS = 60
_HELD = "launch failed requeued held"
_GONE = "Invalid job id"
_LOG_LINES = 60


class SlurmError(MswiftError):
    """A SLURM command failed; its own words are in the text."""


@dataclass(frozen=True)
class Run:
    """One run of a submission, with what it needs of its nodes."""

    config: TrainConfig
    expected: Expected
    limits: Limits


def submit(job: SlurmJob, script: str, runs: Sequence[Run], chain: int) -> list[str]:
    """Save script and resolved recipes in the run's directories, submit `chain` jobs; their numbers.

    ConfigError where a job of the run is still there: two jobs would write one run. SlurmError where sbatch refuses
    one (a limit on jobs); those before it stay.
    """
    if job.script.with_name(JOBS).is_file() and (there := _states(_numbers(job.run_dir))):
        number, words = next(iter(there.items()))
        raise ConfigError(
            f"--output_dir {job.run_dir}: its job {number} is {words.split()[0]}: wait for its end, or "
            f"mswift launch cancel {shlex.quote(str(job.run_dir))}"
        )
    for point, run in enumerate(runs):
        home = job.run_dir / str(point) if job.num_points else job.run_dir
        _open(home / rundir.LAUNCH, run)
    job.script.parent.mkdir(parents=True, exist_ok=True)
    job.script.write_text(script, encoding="utf-8")
    # Options in the environment would win over the script's own lines.
    numbers: list[str] = []
    for _ in range(chain):
        try:
            number = _slurm(["sbatch", "--parsable", str(job.script)])
        except SlurmError as error:
            raise SlurmError(f"{error}{_those_there(job.run_dir, numbers, chain)}") from None
        numbers.append(number.strip().split(";")[0])
        rundir.write_json(job.script.with_name(JOBS), {"jobs": numbers})  # each at once: the next may be refused
    return numbers


def _those_there(run_dir: Path, numbers: Sequence[str], chain: int) -> str:
    """What to say of the jobs of a chain that were submitted before one was not."""
    if not numbers:
        return ""
    return (
        f"; {len(numbers)} of the --chain {chain} jobs stand in the queue ({' '.join(numbers)}) and will run: let "
        f"them, or mswift launch cancel {shlex.quote(str(run_dir))}"
    )


def _open(launch: Path, run: Run) -> None:
    """What a job finds in the run's directory; what an earlier submission left there is over."""
    launch.mkdir(parents=True, exist_ok=True)
    for name in (STARTS, END):
        (launch / name).unlink(missing_ok=True)
    save_yaml(run.config, launch / RECIPE)
    rundir.write_json(launch / LIMITS, vars(run.limits))
    write(launch / EXPECTED, run.expected)


def status(run_dir: Path) -> int:
    """Print the run's jobs in the queue, and the last word of a run that has ended. 1 where it gave up."""
    numbers = _numbers(run_dir)
    states = _states(numbers)
    for number in numbers:
        mine = {key: words for key, words in states.items() if key.split("_")[0] == number}
        for key, words in (mine or {number: "is no longer in the queue"}).items():
            print(f"job {key:<12}{words}")
            if _HELD in words:
                print(f"{'':16}SLURM could not start it on a node and holds it: scontrol release {key} lets it go on")
    gave_up = False
    for path in sorted([*run_dir.glob(f"{rundir.LAUNCH}/{END}"), *run_dir.glob(f"*/{rundir.LAUNCH}/{END}")]):
        end = json.loads(path.read_text())
        gave_up |= end["verdict"] != "done"
        print(f"{end['verdict']:<14}{path.parent.parent}: {end['why']}")
    return int(gave_up)


def logs(run_dir: Path) -> int:
    """Print the end of each log, the newest last."""
    _numbers(run_dir)
    found = sorted((run_dir / rundir.LAUNCH).glob("log-*.txt"), key=lambda path: path.stat().st_mtime)
    if not found:
        print("no log yet: the job has not started")
    for path in found:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        left_out = f" ({len(lines) - _LOG_LINES} lines before)" if len(lines) > _LOG_LINES else ""
        print(f"== {path}{left_out}", *lines[-_LOG_LINES:], sep="\n")
    return 0


def cancel(run_dir: Path) -> int:
    """Cancel the run's jobs."""
    numbers = list(dict.fromkeys(number.split("_")[0] for number in _states(_numbers(run_dir))))
    if not numbers:
        print("nothing to cancel: no job of this run is in the queue")
        return 0
    _slurm(["scancel", *numbers])
    print(f"cancelled {' '.join(numbers)}")
    return 0


def _numbers(run_dir: Path) -> list[str]:
    path = run_dir / rundir.LAUNCH / JOBS
    try:
        return [str(number) for number in json.loads(path.read_text())["jobs"]]
    except (OSError, ValueError, KeyError):
        raise ConfigError(
            f"{run_dir}: no job of it is known ({path} is missing): name what --output_dir named in mswift launch slurm"
        ) from None


def _states(numbers: Sequence[str]) -> dict[str, str]:
    """Job (or job_index) -> state, time, nodes and reason, of those that are in the queue."""
    states: dict[str, str] = {}
    for number in numbers:  # one by one: squeue knows none of a list with one that is gone
        try:
            text = _slurm(["squeue", "--noheader", f"--jobs={number}", "--format=%i|%T %M %D %R"])
        except SlurmError as error:
            if _GONE in str(error):
                continue
            raise
        states |= dict(line.split("|", 1) for line in text.splitlines() if "|" in line)
    return states


def _slurm(argv: Sequence[str]) -> str:
    """Output of a SLURM command. SlurmError with its words; ConfigError where it is not installed."""
    try:
        done: Any = subprocess.run(argv, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{argv[0]} is not installed here: run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{argv[0]} has not answered for {_PATIENCE_SECONDS} s; is slurmctld up (scontrol ping)?"
        ) from None
    if done.returncode:
        raise SlurmError(f"{shlex.join(argv[:2])} failed: {' '.join(done.stderr.split())}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)
    return str(done.stdout)
