"""The first step of a job as its real processes: two ranks meet, sum, and refuse together."""

import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from mswift.launchers import preflight
from mswift.launchers.environment import step_port
from tests.support import slurm
from tests.support.ranks import ROOT


def test_two_ranks_check_and_refuse(tmp_path: Path) -> None:
    launch = tmp_path / "launch"
    launch.mkdir()
    (tmp_path / "rows").write_bytes(b"12345")
    want = preflight.Expected(str(tmp_path), {str(tmp_path / "rows"): 5}, nproc_per_node=2, device="cpu")
    argv = [sys.executable, "-m", "mswift.launchers.node", "--nproc_per_node=2", "--module", "mswift.parallel.check"]

    def check() -> tuple[int, str, str]:
        done = subprocess.run(
            [*argv, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
        )
        return done.returncode, done.stdout, done.stderr

    preflight.write(launch / preflight.EXPECTED, want)
    status, out, err = check()
    assert (status, err) == (0, "")
    assert "preflight: 2 ranks on 1 nodes, cpu, all_reduce " in out
    sick = replace(want, files={str(tmp_path / "rows"): 4}, nproc_per_node=1, all_reduce_floor_gb_per_second=1e6)
    preflight.write(launch / preflight.EXPECTED, sick)
    status, _, err = check()
    assert status == 2
    assert [line.split(": ")[0] for line in err.splitlines()] == ["refused"] * 3
    for words in ("has 5 bytes, 4 where the job was submitted", "has 2 ranks, 1 were asked for", "asks for 1e+06"):
        assert words in err


def test_a_port_that_is_taken_is_told_before_the_run_needs_it(tmp_path: Path) -> None:
    """Two tasks of srun; the step after theirs, which trains, would meet at a port that somebody else has."""
    (tmp_path / "launch").mkdir()
    preflight.write(
        tmp_path / "launch" / preflight.EXPECTED, preflight.Expected(str(tmp_path), nproc_per_node=2, device="cpu")
    )
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER_"))}
    places = [{**slurm.task_on_second_node(rank), "SLURM_STEP_NODELIST": "localhost"} for rank in range(2)]
    mine = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "1"}
    with socket.socket() as other:
        other.bind(("127.0.0.1", step_port({**places[0], **mine}, ahead=1)))
        other.listen()
        argv = [sys.executable, "-m", "mswift.parallel.check", str(tmp_path)]
        tasks = [
            subprocess.Popen(argv, cwd=ROOT, env={**outside, **place, **mine}, stderr=subprocess.PIPE, text=True)
            for place in places
        ]
        errors = [task.communicate(timeout=200)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [2, 2], errors
    assert re.fullmatch(r"refused: node \S+: port \d+, where the ranks were to meet, cannot .* in use.*\n", errors[0])
    assert preflight.read_refusals(tmp_path / "launch")[0] in errors[0]
    assert errors[1] == ""


def test_this_machine_is_looked_at() -> None:
    argv = [sys.executable, "-m", "mswift.cli.main", "doctor", "machine", "--nproc_per_node", "2", "--device", "cpu"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "host", "versions", "cores", "memory", "GPUs", "networks", "disk", "preflight:", "sound:",
    ]  # fmt: skip


def test_a_layout_needs_a_model() -> None:
    argv = [sys.executable, "-m", "mswift.cli.main", "doctor", "layout", "--tensor_model_parallel_size", "2"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--model is required" in done.stderr
