"""One task of srun on each node starts its ranks: `python -m mswift.launchers.node --nproc_per_node=8 sft recipe.yaml`.

With `--run_dir` ranks other than 0 write to files in its logs/JOB.RESTART.STEP.

Which node this is, and where all meet, SLURM's variables say. The process becomes the agent, so that signals and the
exit status are its own.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mswift.errors import MswiftError
from mswift.launchers.environment import current
from mswift.launchers.job import COMMAND_LINE, Job, Meeting
from mswift.launchers.machine import port_refusal
from mswift.rank_words import LOGS


def job_here(
    nproc_per_node: int,
    arguments: Sequence[str],
    environ: Mapping[str, str],
    module: str = COMMAND_LINE,
    run_dir: Path | None = None,
) -> tuple[Job, int]:
    """The job of `python -m module arguments...` on the nodes of this step, and the number of this node in it."""
    info = current(environ)
    number = f"{environ.get('SLURM_JOB_ID', '0')}.{environ.get('SLURM_RESTART_COUNT', '0')}"
    logs = run_dir and run_dir / LOGS / f"{number}.{environ.get('SLURM_STEP_ID', '0')}"
    if info is None:
        return Job(nproc_per_node, module, tuple(arguments), rank_logs=logs), 0
    meeting = Meeting(info.master_addr, info.master_port, number)
    return Job(nproc_per_node, module, tuple(arguments), info.world_size, meeting, logs), info.rank


def main(argv: Sequence[str]) -> int:
    """Become the agent of this node."""
    parser = argparse.ArgumentParser(prog="mswift.launchers.node", allow_abbrev=False)
    parser.add_argument("--nproc_per_node", type=int, required=True)
    parser.add_argument("-m", "--module", default=COMMAND_LINE)
    parser.add_argument("--run_dir", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args(argv)
    try:
        job, rank = job_here(given.nproc_per_node, given.arguments, os.environ, given.module, given.run_dir)
    except MswiftError as error:
        print(f"mswift launch on {os.uname().nodename}: {error}", file=sys.stderr)
        return error.exit_status
    if rank == 0 and job.meeting is not None and (refusal := port_refusal(job.meeting.master_port)):
        print(f"mswift launch on {os.uname().nodename}: {refusal}", file=sys.stderr)
        return 1  # not 2: the next start has another port
    command = job.argv(rank)
    os.execve(command[0], command, job.environment(os.environ))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
