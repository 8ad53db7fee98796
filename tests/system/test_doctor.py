"""`mswift doctor layout` from the command line: proved, refused, and not proved where a collective is missing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.family_configs import family_config
from tests.support.ranks import ROOT

BROKEN = """
from importlib import import_module
from mswift.parallel import device
prepare = device.prepare
def without_sum(*args):
    chosen = prepare(*args)
    finalize = import_module("megatron.core.distributed.finalize_model_grads")
    finalize._allreduce_non_tensor_model_parallel_grads = lambda *_, **__: None
    return chosen
device.prepare = without_sum
"""


def doctor(home: Path, family: str, *flags: str, **changes: Any) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command on a config.json without weights."""
    (home / "config.json").write_text(json.dumps(family_config(family, **changes)))
    argv = [sys.executable, "-m", "mswift.cli.main", "doctor", "layout", "--model", str(home), *flags]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_layout_is_proved(tmp_path: Path) -> None:
    layout = ("--tensor_model_parallel_size", "2", "--sequence_parallel", "--device", "cpu")
    status, out, err = doctor(tmp_path, "qwen3_moe", *layout)
    assert (status, "proved: all" in out) == (0, True), out + err
    assert "noise floor" in out
    assert "gradient model.layers" in out


def test_what_a_launch_refuses_is_refused(tmp_path: Path) -> None:
    status, out, _ = doctor(tmp_path, "llama", "--tensor_model_parallel_size", "3")
    assert status == 2
    assert "refused: --tensor_model_parallel_size 3 does not divide the model's 4 key/value heads" in out
    assert "running" not in out
    status, out, _ = doctor(tmp_path, "llama", "--tuner_type", "lora", "--target_modules", "w_proj")
    assert (status, "refused: --target_modules" in out) == (2, True), out


def test_a_missing_sum_is_not_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks import sitecustomize, which leaves the sum of the norms' gradients out."""
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    layout = ("--tensor_model_parallel_size", "2", "--sequence_parallel", "--device", "cpu")
    status, out, err = doctor(tmp_path, "llama", *layout)
    assert status == 1, out + err
    assert "not proved: " in out
    assert "layernorm" in out
