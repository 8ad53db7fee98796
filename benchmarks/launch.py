"""What SLURM and faults cost a run: the way from sbatch to the first step, and from each fault to the next step.

    python benchmarks/launch.py [--rounds 5] [--faults 1] [--storm_minutes 15] [--write benchmarks/results/launch.md]

A real SLURM on this machine (tests/support/slurm_cluster.py; root, Debian), nodes with a network and processes of
their own, two data-parallel ranks of a tiny model on the CPU. Times count from the fault to the next line of
metrics.jsonl; SLURM's own waits are in them (SlurmdTimeout 10 s, 5 s before a requeued job).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import cpu_name
from mswift import rundir
from mswift.status import read_status
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_faults import FAULTS, Recovery, befall, cancel, storm
from tests.support.slurm_runs import Recipe

TIMEOUT_MINUTES = "0.25"
STORM_EVERY_SECONDS = 90.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of starts; 0: none")
    parser.add_argument("--faults", type=int, default=1, help="times of each fault; 0: none")
    parser.add_argument("--storm_minutes", type=float, default=15.0, help="0: no storm")
    parser.add_argument("--write", type=Path, default=None)
    args = parser.parse_args()
    load = f"load {os.getloadavg()[0]:.0f} at the start, {{:.0f}} at the end"
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name, Cluster(Path(name) / "slurm", num_nodes=3) as cluster:
        folder = Path(name)
        lines = [*_starts(cluster, folder, args.rounds), ""] if args.rounds else []
        lines += [*_recoveries(cluster, folder, args.faults), ""] if args.faults else []
        lines += _storm(cluster, folder, args.storm_minutes * 60) if args.storm_minutes else []
    head = f"Machine: {cpu_name()}, {load.format(os.getloadavg()[0])}. Command: `python {' '.join(sys.argv)}`"
    text = "\n".join([head, "", *lines]) + "\n"
    print(text)
    if args.write:
        args.write.write_text("# What SLURM and faults cost a run\n\n" + text)


def _starts(cluster: Cluster, folder: Path, rounds: int) -> list[str]:
    """Table of the way to the first step, in rotated order."""
    recipe = Recipe.make(folder / "starts", 4, 4)

    def torchrun(output: Path) -> float:
        argv = recipe.command(output)[1:]
        began = time.time()
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *argv]
        subprocess.run(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        return _first_step(output) - began

    def slurm(*flags: str) -> Callable[[Path], float]:
        def start(output: Path) -> float:
            run = recipe.submit(cluster, output, *flags)
            submitted = (output / "launch" / "jobs.json").stat().st_mtime  # written when sbatch had returned
            run.wait_for_end()
            return _first_step(output) - submitted

        return start

    contenders = {
        "torchrun, 2 ranks on this machine": torchrun,
        "sbatch, 2 nodes, without preflight": slurm(),
        "sbatch, 2 nodes, with preflight": slurm("--preflight", "true"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    torchrun(folder / "first")  # fills the caches
    for number in range(rounds):
        names = list(contenders)
        for shift in range(len(names)):
            name = names[(number + shift) % len(names)]
            seconds[name].append(contenders[name](folder / f"run-{number}-{shift}"))
    bare = statistics.median(seconds["torchrun, 2 ranks on this machine"])
    lines = [
        "| until the first step is written down | median s | least | most | beyond torchrun |",
        "|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        middle = statistics.median(values)
        lines.append(f"| {name} | {middle:.1f} | {min(values):.1f} | {max(values):.1f} | {middle - bare:.1f} |")
    print(*lines, sep="\n", flush=True)
    return [*lines, "", f"{rounds} rounds, rotated order; from the start of torchrun, or the return of sbatch."]


def _first_step(output: Path) -> float:
    """When the first step of a run of few was written down."""
    later = sum(row["step_seconds"] for row in rundir.read_metrics(output)[1:])
    return (output / rundir.METRICS).stat().st_mtime - later


def _recoveries(cluster: Cluster, folder: Path, times: int) -> list[str]:
    """Table of the way back, by fault."""
    recipe = Recipe.make(folder / "faults", 1_000_000, 100)
    run = recipe.submit(cluster, folder / "run-faults", "--distributed_timeout_minutes", TIMEOUT_MINUTES)
    found = [befall(run, name) for name in FAULTS for _ in range(times)]
    cancel(run)
    lines = ["| fault | steps done again | s until the job began again | s until the next step |", "|---|---|---|---|"]
    for name in FAULTS:
        mine = [recovery for recovery in found if recovery.name == name]
        lines.append(f"| {name} | {_range(mine, 'repeated_steps')} | {_range(mine, 'seconds_to_start')} | "
                     f"{_range(mine, 'seconds_to_step')} |")  # fmt: skip
    return [*lines, "", f"A save every {recipe.save_steps} steps, --distributed_timeout_minutes {TIMEOUT_MINUTES}."]


def _range(found: list[Recovery], what: str) -> str:
    values = sorted(getattr(recovery, what) for recovery in found)
    return " to ".join(dict.fromkeys(f"{value:.0f}" for value in (values[0], values[-1])))


def _storm(cluster: Cluster, folder: Path, seconds: float) -> list[str]:
    """What `mswift status` says of a run under faults, and what its save interval allows."""
    recipe = Recipe.make(folder / "storm", 1_000_000, 50, "--global_batch_size", "64")
    run = recipe.submit(cluster, folder / "run-storm", "--distributed_timeout_minutes", TIMEOUT_MINUTES)
    found = storm(run, seconds, STORM_EVERY_SECONDS)
    cancel(run)
    status = cluster.client(sys.executable, "-m", "mswift.cli.main", "status", str(run.output), check=False)
    line = next(line for line in status.splitlines() if line.startswith("goodput"))
    allowed = run.allowed_goodput(len(found))
    share = read_status(run.output).goodput.share
    faults = ", ".join(recovery.name for recovery in found)
    return [
        f"Storm of {seconds / 60:g} minutes, a fault every {STORM_EVERY_SECONDS:g} s ({faults}), a save every "
        f"{recipe.save_steps} steps, --distributed_timeout_minutes {TIMEOUT_MINUTES}: "
        f"`{' '.join(line.split())}`. The save interval allows {allowed:.1%}: {share / allowed:.1%} of that."
    ]


if __name__ == "__main__":
    main()
