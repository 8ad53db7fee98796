"""Promise 4: a checkpoint exists only once it is complete and committed; a damaged file is named."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from mswift import rundir
from mswift.errors import CheckpointError, ConfigError
from mswift.train.resume import find_resume_point


def _publish(output_dir: Path, step: int) -> Path:
    partial = rundir.partial_dir(output_dir, step)
    partial.mkdir(parents=True)
    (partial / "weights").write_bytes(bytes(range(256)) * step)
    destination = rundir.checkpoint_dir(output_dir, step)
    rundir.commit(partial, destination, {"weights": rundir.hash_file(partial / "weights")})
    return destination


def test_only_committed_directories_count(tmp_path: Path) -> None:
    _publish(tmp_path, 9)
    _publish(tmp_path, 10)
    (tmp_path / "checkpoint-11").mkdir()
    rundir.partial_dir(tmp_path, 12).mkdir()
    assert rundir.committed_steps(tmp_path) == [9, 10]
    assert rundir.resolve_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    rundir.check_files(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    path = _publish(tmp_path, 3) / "weights"
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:5] + bytes([data[5] ^ 1]) + data[6:])
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match="checkpoint-3/weights is (damaged|missing)"):
        rundir.check_files(path.parent)


def test_prune_keeps_the_newest_and_never_the_last_one(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        _publish(tmp_path, step)
    rundir.prune(tmp_path, 2)
    assert rundir.committed_steps(tmp_path) == [2, 10]
    rundir.prune(tmp_path, 0)
    assert rundir.committed_steps(tmp_path) == [10]


def test_damaged_commit_is_an_error_in_words(tmp_path: Path) -> None:
    path = _publish(tmp_path, 1)
    (path / rundir.COMMIT).write_text("{")
    with pytest.raises(CheckpointError, match="use an older checkpoint"):
        rundir.check_files(path)


def test_resume_flag(tmp_path: Path) -> None:
    assert find_resume_point(tmp_path, "auto") is None
    assert find_resume_point(tmp_path / "absent", "false") is None
    with pytest.raises(ConfigError, match="--resume auto"):
        find_resume_point(tmp_path, "true")
    _publish(tmp_path, 4)
    with pytest.raises(ConfigError, match="--resume auto"):
        find_resume_point(tmp_path, "false")
    for resume in ("auto", "true"):
        point = find_resume_point(tmp_path, resume)  # type: ignore[arg-type]
        assert point is not None
        assert point.step == 4


def test_metrics_are_cut_at_the_resumed_step_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / rundir.METRICS).write_text("\n".join(lines) + '\n{"step": 4, "lo')
    assert [row["step"] for row in rundir.read_metrics(tmp_path)] == [1, 2, 3]
    rundir.truncate_metrics(tmp_path, 2)
    assert (tmp_path / rundir.METRICS).read_text() == "\n".join(lines[:2]) + "\n"


@pytest.mark.parametrize("line", [b"[]", b"\xff\xfe", b'{"loss": 1}', b'{"step": 1, "lo'])
def test_metrics_that_hold_something_else_are_named_by_line(tmp_path: Path, line: bytes) -> None:
    (tmp_path / rundir.METRICS).write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(
        CheckpointError, match=r"metrics.jsonl, line 2: not a JSON object with a step; remove that line"
    ):
        rundir.truncate_metrics(tmp_path, 3)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    with rundir.locked(output_dir), pytest.raises(ConfigError, match="another run is writing there"):
        rundir.locked(output_dir).__enter__()
    with rundir.locked(output_dir):
        assert rundir.committed_steps(output_dir) == []


def test_what_is_no_checkpoint_is_moved_out_of_its_place_and_kept(tmp_path: Path) -> None:
    foreign = rundir.checkpoint_dir(tmp_path, 3)
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"of another program")
    _publish(tmp_path, 3)
    assert rundir.committed_steps(tmp_path) == [3]
    (aside,) = tmp_path.glob("checkpoint-3.not-committed-*")
    assert (aside / "model.safetensors").read_bytes() == b"of another program"


def test_a_removal_cut_short_leaves_nothing_in_the_place_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        _publish(tmp_path, step)

    def cut_short(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut_short)
        with pytest.raises(KeyboardInterrupt):
            rundir.prune(tmp_path, 1)
    assert rundir.committed_steps(tmp_path) == [2]
    assert not rundir.checkpoint_dir(tmp_path, 1).exists()


def test_a_commit_that_appears_late_is_waited_for(tmp_path: Path) -> None:
    threading.Timer(0.3, lambda: _publish(tmp_path, 1)).start()
    rundir.await_commit(rundir.checkpoint_dir(tmp_path, 1), 30)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="not a committed checkpoint"):
        rundir.await_commit(rundir.checkpoint_dir(tmp_path, 2), 0.3)
    assert time.monotonic() - started < 5
