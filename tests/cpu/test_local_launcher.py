"""Jobs of two ranks under real torchrun: ranks, exit statuses, signals, messages. The ranks themselves use no torch."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mswift.launchers.job import Job

RANK_PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from mswift.errors import CheckpointError, ConfigError
from mswift.launchers.environment import current
info, mode = current(), sys.argv[1]
here = Path(sys.argv[2])
(here / f"rank{info.rank}").write_text(f"{info.rank} {info.world_size} {os.environ['OMP_NUM_THREADS']}")
def stop(number, frame):
    (here / f"stopped{info.rank}").write_text(signal.Signals(number).name)
    sys.exit(0)
if mode == "wait":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])  # under the agent it is blocked until a rank listens
    (here / f"ready{info.rank}").touch()
    time.sleep(60)
if mode == "cause":
    time.sleep(0 if info.rank == 1 else 2)
    print(f"rank {info.rank} says why", file=sys.stderr)
    os._exit(1)
if mode.startswith("fail") and info.rank == 1:
    print("rank 1 says why", file=sys.stderr)
    os._exit(int(mode[4:]))
if mode == "killed" and info.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if mode != "fine":
    time.sleep(60)
"""

LAUNCHER = """
import sys
from pathlib import Path
from mswift.launchers.job import Job
from mswift.launchers.local import run
assert "torch" not in sys.modules
logs = Path(sys.argv[2]) / "logs" / "start" if sys.argv[1].endswith("-logged") else None
sys.exit(run(Job(2, "rank_program", (sys.argv[1].removesuffix("-logged"), sys.argv[2]), rank_logs=logs)))
"""


def _start(mode: str, folder: Path) -> "subprocess.Popen[str]":
    (folder / "rank_program.py").write_text(RANK_PROGRAM)
    command = [sys.executable, "-c", LAUNCHER, mode, str(folder)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(mode: str, folder: Path) -> tuple[int, str]:
    with _start(mode, folder) as process:
        _, stderr = process.communicate(timeout=100)
    return process.returncode, stderr


def test_two_ranks_that_do_nothing(tmp_path: Path) -> None:
    status, _ = _finish("fine", tmp_path)
    assert status == 0
    assert [(tmp_path / f"rank{rank}").read_text()[:3] for rank in range(2)] == ["0 2", "1 2"]


@pytest.mark.parametrize("code", [1, 2])
def test_the_status_and_the_words_of_a_failed_rank_come_through(code: int, tmp_path: Path) -> None:
    started = time.monotonic()
    status, stderr = _finish(f"fail{code}", tmp_path)
    assert status == code
    assert stderr == "rank 1 says why\n"
    assert time.monotonic() - started < 45  # the other rank, asleep for 60 s, was ended


def test_a_rank_that_fails_first_does_not_silence_the_one_that_knows_the_cause(tmp_path: Path) -> None:
    status, stderr = _finish("cause", tmp_path)
    assert (status, stderr) == (1, "rank 1 says why\nrank 0 says why\n")


def test_ranks_write_to_files_and_their_last_words_are_repeated(tmp_path: Path) -> None:
    """Rank 0 writes to the console; files of ranks that said nothing go, as does their folder."""
    status, stderr = _finish("cause-logged", tmp_path)
    log = tmp_path / "logs" / "start" / "rank-00001.err"
    assert (status, log.read_text()) == (1, "rank 1 says why\n")
    assert stderr == f"rank 0 says why\nmswift: rank 1 ended with 1; {log} ends:\nrank 1 says why\n"
    assert list(log.parent.iterdir()) == [log]
    log.unlink()
    assert _finish("fine-logged", tmp_path) == (0, "")
    assert not (tmp_path / "logs").exists()
    (tmp_path / "logs").write_text("in the way")
    status, stderr = _finish("fine-logged", tmp_path)
    assert status == 1
    assert f"{log.parent}, where ranks are to write, cannot be made (Not a directory): free some space" in stderr


def test_a_killed_rank_is_reported(tmp_path: Path) -> None:
    status, stderr = _finish("killed", tmp_path)
    assert status == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL (out of memory?)" in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_reach_every_rank_once_they_may_end_well(number: signal.Signals, tmp_path: Path) -> None:
    with _start("wait", tmp_path) as process:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert [(tmp_path / f"stopped{rank}").read_text() for rank in range(2)] == [number.name] * 2


def test_the_launchers_death_ends_the_job(tmp_path: Path) -> None:
    with _start("wait", tmp_path) as process:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        process.kill()
        process.wait()
        while len(list(tmp_path.glob("stopped*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
    assert [(tmp_path / f"stopped{rank}").read_text() for rank in range(2)] == ["SIGTERM"] * 2


def test_cores_are_shared_out_unless_the_user_decided() -> None:
    job = Job(64, "m")
    assert job.environment({})["OMP_NUM_THREADS"] == "1"
    assert job.environment({"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
