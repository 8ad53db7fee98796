"""Promise 4: a checkpoint exists only once it is complete and committed; a damaged file is named."""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mswift import run_lock, rundir
from mswift.config.train import SftConfig
from mswift.errors import CheckpointError, ConfigError
from mswift.train import retention
from mswift.train.resume import ResumePoint, find_resume_point, start_of, starting_point

ROOT = Path(__file__).parents[2]


def _publish(output_dir: Path, number: int, step: int | None = None, **state: Any) -> Path:
    partial = rundir.partial_dir(output_dir, number)
    partial.mkdir(parents=True)
    (partial / "weights").write_bytes(bytes(range(256)) * number)
    (partial / rundir.STATE).write_text(json.dumps({"step": step or number, **state}))
    destination = rundir.checkpoint_dir(output_dir, number)
    rundir.commit(partial, destination, {n: rundir.hash_file(partial / n) for n in ("weights", rundir.STATE)})
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
    retention.prune(tmp_path, 2)
    assert rundir.committed_steps(tmp_path) == [2, 10]
    retention.prune(tmp_path, 0)
    assert rundir.committed_steps(tmp_path) == [10]


def test_prune_does_not_count_what_is_not_whole(tmp_path: Path) -> None:
    """The newest one truncated on the disk: the only good one stays, whatever the limit."""
    for step in (1, 2, 3):
        _publish(tmp_path, step)
    (tmp_path / "checkpoint-3" / "weights").write_bytes(b"short")
    assert retention.prune(tmp_path, 1) == [tmp_path / "checkpoint-1"]
    assert rundir.committed_steps(tmp_path) == [2, 3]
    (tmp_path / "checkpoint-2" / "weights").unlink()
    assert retention.prune(tmp_path, 1) == []


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
    with run_lock.locked(output_dir), pytest.raises(ConfigError, match="another run is writing there"):
        run_lock.locked(output_dir).__enter__()
    with run_lock.locked(output_dir):
        assert rundir.committed_steps(output_dir) == []


def test_the_refusal_says_who_holds_the_lock(tmp_path: Path) -> None:
    with run_lock.locked(tmp_path):
        with pytest.raises(ConfigError, match=rf"\(pid {os.getpid()} on {platform.node()}, since 20.*\)"):
            run_lock.locked(tmp_path).__enter__()
        lock = tmp_path / rundir.LOCK
        lock.write_text(json.dumps({"host": "node7", "pid": 3, "since": "noon", "slurm_job": "99"}))
        with pytest.raises(ConfigError, match=r"pid 3 on node7, SLURM job 99.*lease ends, about 90 s"):
            run_lock.locked(tmp_path).__enter__()
        lock.write_text("{")
        with pytest.raises(ConfigError, match="writing there now; wait for its end"):
            run_lock.locked(tmp_path).__enter__()


def test_an_earlier_start_of_the_same_job_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its nodes may be cut off, where its ranks work on; anybody else is refused."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    holder = threading.Event()

    def hold() -> None:
        with run_lock.locked(tmp_path):
            holder.set()
            ended.wait()

    for job, restart, chain, waits in (("7", "1", [], True), ("7", "0", [], False), ("8", "0", [], False),
                                       ("8", "0", ["7", "8"], True)):  # fmt: skip
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        (tmp_path / rundir.LAUNCH).mkdir(exist_ok=True)
        rundir.write_json(tmp_path / rundir.LAUNCH / rundir.JOBS, {"jobs": chain})
        ended, thread = threading.Event(), threading.Thread(target=hold)
        holder.clear()
        thread.start()
        holder.wait()
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        if waits:
            threading.Timer(run_lock._PATIENCE_SECONDS + 0.5, ended.set).start()
            with run_lock.locked(tmp_path, 60):
                assert f"earlier start of this job to end: pid {os.getpid()} on" in capsys.readouterr().out
        else:
            with pytest.raises(ConfigError, match="another run is writing there now"):
                run_lock.locked(tmp_path, 60).__enter__()
            ended.set()
        thread.join()


def test_a_lock_outlives_no_process(tmp_path: Path) -> None:
    """The partner of the lock: kill -9 of its holder gives it back at once."""
    program = (
        "import sys, time; from pathlib import Path; from mswift.run_lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"pid {process.pid}"):
            run_lock.locked(tmp_path).__enter__()
        process.kill()
        process.wait()
        with run_lock.locked(tmp_path):
            pass


def _config(output_dir: Path, **fields: Any) -> SftConfig:
    return SftConfig(model="unused", output_dir=str(output_dir), **fields)


def test_a_start_from_another_runs_checkpoint(tmp_path: Path) -> None:
    other, own = tmp_path / "other", tmp_path / "own"
    _publish(other, 7, step=9)
    found = starting_point(_config(own, resume_from_checkpoint=str(other)))
    assert found == ResumePoint(other / "checkpoint-7", 9)
    found = starting_point(_config(own, resume_from_checkpoint=str(other / "checkpoint-7"), load_weights_only=True))
    assert found == ResumePoint(other / "checkpoint-7", 0, weights_only=True)
    _publish(own, 2)
    assert starting_point(_config(own, resume_from_checkpoint=str(other))) == ResumePoint(own / "checkpoint-2", 2)
    for inside in (own, own / "checkpoint-2"):
        with pytest.raises(ConfigError, match="lies in --output_dir"):
            starting_point(_config(own, resume_from_checkpoint=str(inside)))
    with pytest.raises(ConfigError, match="--resume_from_checkpoint: .*neither a committed checkpoint"):
        starting_point(_config(own, resume_from_checkpoint=str(tmp_path / "absent")))


def test_weights_alone_come_with_the_model_of_their_run(tmp_path: Path) -> None:
    """Flags that change a model before it is trained would have no effect on them."""
    other, own = tmp_path / "other", tmp_path / "own"
    _publish(other, 7, step=9, config={"rope_scaling": "yarn", "max_model_len": 512, "new_special_tokens": ["<x>"]})
    start = _config(own, resume_from_checkpoint=str(other), load_weights_only=True)
    same: dict[str, Any] = {"rope_scaling": "yarn", "max_model_len": 512, "new_special_tokens": ("<x>",)}
    for flags in ({}, same):
        assert start_of(dataclasses.replace(start, **flags))[0] == other / "checkpoint-7"
    for name, value, then in (("rope_scaling", "linear", "yarn"), ("new_special_tokens", ("<y>",), "<x>")):
        with pytest.raises(ConfigError, match=rf"--{name} .*had .*{then}.* give --model .*checkpoint-7 in place of"):
            start_of(dataclasses.replace(start, **{name: value}))
    changed = dataclasses.replace(start, rope_scaling="linear", load_weights_only=False)
    assert start_of(changed)[0] == other / "checkpoint-7"  # a run that goes on has other checks


def test_a_checkpoint_that_is_plainly_damaged_is_passed_over_only_when_asked(tmp_path: Path) -> None:
    for step in (3, 4):
        _publish(tmp_path, step)
    (tmp_path / "checkpoint-4" / "weights").write_bytes(b"short")
    assert starting_point(_config(tmp_path)) == ResumePoint(tmp_path / "checkpoint-4", 4)
    before = ResumePoint(tmp_path / "checkpoint-3", 3)
    assert starting_point(_config(tmp_path, damaged_checkpoint="previous")) == before
    (tmp_path / "checkpoint-3" / rundir.COMMIT).write_text("{")
    with pytest.raises(CheckpointError, match="every checkpoint in --output_dir .* is damaged"):
        starting_point(_config(tmp_path, damaged_checkpoint="previous"))


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
            retention.prune(tmp_path, 1)
    assert rundir.committed_steps(tmp_path) == [2]
    assert not rundir.checkpoint_dir(tmp_path, 1).exists()


def test_a_commit_that_appears_late_is_waited_for(tmp_path: Path) -> None:
    threading.Timer(0.3, lambda: _publish(tmp_path, 1)).start()
    rundir.await_commit(rundir.checkpoint_dir(tmp_path, 1), 30)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="not a committed checkpoint"):
        rundir.await_commit(rundir.checkpoint_dir(tmp_path, 2), 0.3)
    assert time.monotonic() - started < 5
