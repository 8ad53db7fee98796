"""`mswift status` reads a run right while it writes, after kill -9, with torn lines; goodput counts what counts."""

import fcntl
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mswift import rank_words, rundir
from mswift.cli.main import main
from mswift.errors import ConfigError
from mswift.ledger import FINISHED, Ledger, goodput, read_events
from mswift.run_lock import locked
from mswift.status import read_status


def row(step: int, seconds: float = 2.0) -> dict[str, Any]:
    return {"step": step, "loss": 1.5, "grad_norm": 0.5, "lr": 1e-4, "epoch": 0.1 * step, "step_seconds": seconds,
            "tokens_per_second": 512.0}  # fmt: skip


def log(output: Path, *steps: int, torn: bool = False) -> None:
    with (output / rundir.METRICS).open("a") as file:
        file.writelines(json.dumps(row(step)) + "\n" for step in steps)
        file.write('{"step": 99, "lo' if torn else "")


def committed(output: Path, step: int) -> Path:
    path = rundir.checkpoint_dir(output, step)
    path.mkdir()
    rundir.write_commit(path, {})
    return path


def test_a_directory_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        read_status(tmp_path)
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_run_under_way(tmp_path: Path) -> None:
    with locked(tmp_path):
        Ledger(tmp_path).start(0, 10, 8)
        log(tmp_path, 1, 2, 3, torn=True)
        path = committed(tmp_path, 2)
        Ledger(tmp_path).saved(2, 0.25)
        status = read_status(tmp_path)
        assert (status.state, status.step, status.last_step) == ("running", 3, 10)
        assert f"pid {os.getpid()}" in (status.reason or "")
        assert status.seconds_left == pytest.approx(14)
        assert status.checkpoint == str(path)
        assert status.goodput.steps == 6
        assert status.goodput.saves == 0.25
    assert read_status(tmp_path).state == "killed"  # the lock is free and nothing was said


def test_the_share_of_time_that_went_into_waiting_for_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By time, not by steps; rows of before it was measured tell nothing."""
    Ledger(tmp_path).start(0, 4, 1)
    log(tmp_path, 1)
    assert read_status(tmp_path).data_wait is None
    rows = [row(2, 1.0) | {"data_wait": 0.5}, row(3, 9.0) | {"data_wait": 0.1}]
    with (tmp_path / rundir.METRICS).open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)
    assert read_status(tmp_path).data_wait == pytest.approx(0.14)
    main(["status", str(tmp_path)])
    assert "4 s a step, 14.0% of it waiting for data" in capsys.readouterr().out


def test_looking_does_not_keep_a_run_out(tmp_path: Path) -> None:
    Ledger(tmp_path).start(0, 10, 1)
    read_status(tmp_path)
    assert not (tmp_path / rundir.LOCK).exists()
    with locked(tmp_path):
        assert read_status(tmp_path).state == "running"
    with (tmp_path / rundir.LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as a look does, here a long one
        threading.Timer(0.3, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with locked(tmp_path):
            assert read_status(tmp_path).state == "running"


@pytest.mark.parametrize(
    ("reason", "state", "exit_status"),
    [(FINISHED, "finished", 0), ("SIGTERM", "stopped", 1), ("ConfigError: no space", "failed", 1)],
)
def test_ends(tmp_path: Path, reason: str, state: str, exit_status: int, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(tmp_path)
    ledger.start(0, 4, 1)
    log(tmp_path, 1, 2, 3, 4)
    ledger.stop(4, reason)
    assert read_status(tmp_path).state == state
    assert main(["status", str(tmp_path)]) == exit_status
    said = capsys.readouterr().out
    assert f"state       {state}" in said
    assert "step        4 of 4 (100.0%)" in said
    assert main(["status", str(tmp_path), "--json"]) == exit_status
    assert json.loads(capsys.readouterr().out)["state"] == state


def test_steps_done_again_are_counted_and_dropped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.start(0, 10, 1)
    log(tmp_path, 1, 2, 3, 4, 5, torn=True)
    with (tmp_path / rundir.LEDGER).open("a") as file:
        file.write('{"event": "sav')  # killed in the middle of a line
    ledger.start(2, 10, 1)
    log(tmp_path, 3)
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "start"]
    status = read_status(tmp_path)
    assert (status.starts, status.repeated_steps, status.step) == (2, 3, 3)
    assert status.goodput.repeated == 6
    assert [r["step"] for r in rundir.read_metrics(tmp_path)] == [1, 2, 3]


def test_an_error_is_the_reason_of_the_stop(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), Ledger(tmp_path).failing(lambda: 7):
        raise ValueError("broken\nsecond line")
    (event,) = read_events(tmp_path)
    assert (event["step"], event["reason"]) == (7, "ValueError: broken")


def test_goodput_by_hand() -> None:
    """Killed at 130, back at 200, stopped at 300, back at 400, seen at 450: up 30 + 100 + 50 of 350 seconds."""
    events = [
        {"event": "start", "time": 100.0, "starting_seconds": 11.0},
        {"event": "save", "time": 120.0, "seconds": 3.0},
        {"event": "start", "time": 200.0, "last_activity": 130.0, "repeated_seconds": 8.0},
        {"event": "save", "time": 280.0, "seconds": 4.0},
        {"event": "stop", "time": 300.0, "reason": "SIGTERM"},
        {"event": "start", "time": 400.0, "last_activity": 299.0, "starting_seconds": 12.0},
    ]
    found = goodput(events, [row(step, 9.0) for step in range(1, 17)], 450.0)
    assert (found.up, found.steps, found.saves, found.repeated) == (180.0, 144.0, 7.0, 8.0)
    assert (found.starting, found.wall) == (23.0, 350.0)
    assert (found.share, found.wall_share) == (0.8, 144 / 350)
    assert goodput(events[:-1], [], 999.0).wall == 200.0  # a run that has stopped is not seen any more
    assert goodput([], [], 450.0).wall_share == 0.0


def test_notes(tmp_path: Path) -> None:
    Ledger(tmp_path).start(0, 10, 1)
    (tmp_path / "not-finite-3.jsonl").write_text("")
    (tmp_path / "hang-1").mkdir()
    (tmp_path / rundir.REJECTED).write_text("{}\n{}\n")
    assert [note.partition(":")[0] for note in read_status(tmp_path).notes] == [
        "not-finite-3.jsonl", "hang-1", "rejected.jsonl"
    ]  # fmt: skip


def test_the_last_words_of_64_ranks_while_they_write(tmp_path: Path) -> None:
    """What few said comes first; torn ends, silent ranks and files of an older start do no harm."""
    ledger = Ledger(tmp_path)
    ledger.start(0, 4, 64)
    for start, words in (("1.0.2", "old"), ("1.1.2", "Connection closed by peer")):
        folder = tmp_path / rank_words.LOGS / start
        folder.mkdir(parents=True)
        for rank in range(1, 64):
            rank_words.path_of(folder, rank).write_text(f"rank {rank} begins\n{words}\n\n")
    rank_words.path_of(folder, 17).write_bytes(b"x" * 100_000 + "\nOutOfMemoryError: é".encode()[:-1])
    rank_words.path_of(folder, 40).write_text("")
    os.utime(folder.parent / "1.0.2", (1, 1))
    assert read_status(tmp_path).notes == (
        "rank 17 said last: OutOfMemoryError: \ufffd",
        "ranks 1-16, 18-39, 41-63 said last: Connection closed by peer",
    )
    with locked(tmp_path):
        assert read_status(tmp_path).notes == ()  # it runs
    with (tmp_path / rundir.LEDGER).open("a") as file:  # a later start, whose ranks said nothing
        file.write(json.dumps({"event": "start", "step": 2, "time": time.time() + 60}) + "\n")
    assert read_status(tmp_path).notes == ()


def test_the_last_words_of_tasks_of_srun(tmp_path: Path) -> None:
    """From the log that srun labelled; its own lines are nobody's."""
    Ledger(tmp_path).start(0, 4, 12)
    (tmp_path / rundir.LAUNCH).mkdir()
    lines = [*(f"{rank:2}: of the start before" for rank in range(13)), "mswift launch: again: exit status 1"]
    lines += [
        *(f"{rank:2}: same words" for rank in range(12)),
        " 3: cause: 7",
        "srun: error: n1: task 3: Exited",
        "11: ",
    ]
    for verdict in ("srun: error: n1", "mswift launch: stop: exit status 1\nsrun: error: n1: task 0: Exited"):
        (tmp_path / rundir.LAUNCH / "log-7.txt").write_text("\n".join([*lines, verdict]))
        assert read_status(tmp_path).notes == ("rank 3 said last: cause: 7", "ranks 0-2, 4-11 said last: same words")
