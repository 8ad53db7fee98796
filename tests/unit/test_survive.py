"""When a job goes on, is done, or gives up: by the checkpoints of the run, not by what SLURM saw."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mswift import rundir
from mswift.launchers import preflight
from mswift.launchers.survive import AGAIN, DONE, END, GIVEN_UP, LIMITS, STARTS, Limits, judge, main

LIMITS_HERE = Limits(max_restarts=5, max_idle_restarts=2)


def starts(*newest: int | None) -> list[dict[str, Any]]:
    return [{"job": "7", "restart": number, "newest": step} for number, step in enumerate(newest)]


@pytest.mark.parametrize(
    ("status", "began", "newest", "verdict", "words"),
    [
        (0, (None,), 10, "done", "its newest checkpoint is checkpoint-10"),
        (0, (10, 10, 10, 10), 10, "done", "finished"),
        (2, (None,), None, "stop", r"refused \(exit status 2\)"),
        (3, (None,), 4, "again", "exit status 3; went on to checkpoint-4"),
        (143, (None,), None, "again", "no new checkpoint in 1 of these starts"),
        (1, (4, 4), 4, "again", "no new checkpoint in 2"),
        (1, (4, 4, 4), 4, "stop", r"3 starts in a row brought no new checkpoint \(still checkpoint-4"),
        (1, (None, None, None), None, "stop", "still no checkpoint"),
        (1, (4, 4, 4), 5, "again", "went on to checkpoint-5"),
        (1, (None, 1, 2, 2, 3, 4), 5, "stop", "started 6 times.*--max_restarts 5.*newest checkpoint is checkpoint-5"),
    ],
)
def test_verdicts(status: int, began: tuple[int | None, ...], newest: int | None, verdict: str, words: str) -> None:
    found = judge(status, starts(*began), newest, LIMITS_HERE)
    assert found.verdict == verdict
    assert re.search(words, found.why)


def test_what_the_preflight_refused_is_the_last_word(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever status srun made of it; and a later submission begins without it."""
    assert start(run, 0, monkeypatch) == 0
    preflight.write_refusals(run / rundir.LAUNCH, ["node n2: /m/w is missing", "node n2: full"])
    assert main(["end", str(run), "--status", "143"]) == GIVEN_UP
    said = "refused: node n2: /m/w is missing (and 1 more, in the log)"
    assert json.loads((run / rundir.LAUNCH / END).read_text()) == {"verdict": "stop", "why": said}
    for name in (END, STARTS):
        (run / rundir.LAUNCH / name).unlink()
    assert start(run, 0, monkeypatch) == 0
    assert main(["end", str(run), "--status", "3"]) == AGAIN


def checkpoint(run: Path, step: int) -> None:
    (run / f"checkpoint-{step}").mkdir(parents=True)
    rundir.write_commit(run / f"checkpoint-{step}", {})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / rundir.LAUNCH).mkdir()
    (tmp_path / rundir.LAUNCH / LIMITS).write_text(json.dumps({"max_restarts": 3, "max_idle_restarts": 1}))
    return tmp_path


def start(run: Path, restart: int, monkeypatch: pytest.MonkeyPatch, job: str = "7") -> int:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    return main(["begin", str(run)])


def test_a_run_that_goes_on_until_it_is_done(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for restart in range(3):
        assert start(run, restart, monkeypatch) == 0
        checkpoint(run, 10 * (restart + 1))
        assert main(["end", str(run), "--status", "3" if restart < 2 else "0"]) == (AGAIN if restart < 2 else 0)
    lines = (run / rundir.LAUNCH / STARTS).read_text().splitlines()
    assert [json.loads(line)["newest"] for line in lines] == [None, 10, 20]
    capsys.readouterr()
    assert start(run, 0, monkeypatch, job="8") == DONE  # the next of a chain
    assert "the run is finished; its newest checkpoint is checkpoint-30" in capsys.readouterr().out


def test_a_run_without_progress_gives_up_and_so_do_the_jobs_after_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(run, 0, monkeypatch) == 0
    assert main(["end", str(run), "--status", "1"]) == AGAIN
    assert start(run, 1, monkeypatch) == 0
    assert main(["end", str(run), "--status", "1"]) == GIVEN_UP
    assert "2 starts in a row brought no new checkpoint" in json.loads((run / "launch" / END).read_text())["why"]
    assert start(run, 0, monkeypatch, job="8") == GIVEN_UP
    assert capsys.readouterr().out.count("2 starts in a row") == 2


def test_starts_that_slurm_ended_by_itself_count_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost node leaves no word: SLURM queues the job again, and the next start looks at the ones before."""
    assert [start(run, restart, monkeypatch) for restart in range(3)] == [0, 0, GIVEN_UP]


def test_slurms_own_restarts_are_capped(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for restart in range(4):
        assert start(run, restart, monkeypatch) == 0
        checkpoint(run, restart)
    assert start(run, 4, monkeypatch) == GIVEN_UP
    assert "all that --max_restarts 3 allows" in json.loads((run / "launch" / END).read_text())["why"]


def test_a_disk_that_is_full_and_a_line_that_it_left_torn(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder in place of the file that cannot be written."""
    launch = run / rundir.LAUNCH
    assert start(run, 0, monkeypatch) == 0
    with (launch / STARTS).open("ab") as file:
        file.write(b'{"time": 1, "jo')
    assert start(run, 1, monkeypatch) == 0
    assert [found["restart"] for found in rundir.read_objects(launch / STARTS)] == [0, 1]
    (launch / STARTS).unlink()
    (launch / STARTS).mkdir()
    (launch / f"{END}.tmp").mkdir()
    assert start(run, 1, monkeypatch) == GIVEN_UP
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"mswift launch: stop: {launch} cannot be written (Is a directory): make it writable or")
    assert second == f"mswift launch: {launch / END} cannot be written (Is a directory)"


def test_the_script_of_a_node_that_was_cut_off_decides_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(run, 0, monkeypatch) == 0
    assert start(run, 1, monkeypatch) == 0  # SLURM has started it elsewhere
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert main(["end", str(run), "--status", "1"]) == GIVEN_UP
    assert "the run has gone on elsewhere" in capsys.readouterr().out
    assert not (run / rundir.LAUNCH / END).exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    checkpoint(run, 5)
    assert main(["end", str(run), "--status", "143"]) == AGAIN
