"""--use_liger_kernel: Liger's own kernels, run by triton's interpreter, against transformers; what a CPU is told.

Not a test of speed or memory, and none of what a GPU's compiler makes of the kernels.
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mswift import rundir
from mswift.refusals.backend import LIGER_TYPES
from tests.support.commands import PROGRAM, command, make_home, run
from tests.support.server import ENVIRON, ROOT

pytest.importorskip("liger_kernel", reason="pip install 'mswift[liger]'")

FEW = ("gemma2", "glm4", "gpt_oss", "llama")
OTHERS = tuple(kind for kind in LIGER_TYPES if kind not in FEW)
KINDS = [*FEW, *(pytest.param(kind, marks=pytest.mark.whole) for kind in OTHERS)]
TOLD = ("--backend", "ddp", "--use_liger_kernel", "true")
INTERPRETED = (sys.executable, "-m", "tests.support.liger")


def _output(*words: str) -> str:
    done = subprocess.run([*INTERPRETED, *words], cwd=ROOT, env=ENVIRON, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@cache
def compared(*kinds: str) -> dict[str, Any]:
    return json.loads(_output(*kinds).splitlines()[-1])


def of(kind: str) -> dict[str, Any]:
    return compared(*(FEW if kind in FEW else OTHERS))[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_transformers(kind: str) -> None:
    found = of(kind)
    assert found["loss"] < 1e-6
    assert found["gradients"] < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_changed_is_changed_in_one_model(kind: str) -> None:
    found = of(kind)
    assert found["others"]
    words = " ".join(found["changed"])
    assert "RMSNorm" in words
    assert ("MLP" in words) == (kind != "gpt_oss")
    assert ("Attention" in words) == (kind != "glm4")  # whose rotation Liger leaves to transformers


def test_a_run_is_the_run_without(tmp_path: Path) -> None:
    home, steps = make_home(tmp_path), []
    flags = ["--backend", "fsdp", "--tuner_type", "lora", "--train_iters", "2", "--max_length", "40", "--packing",
             "--global_batch_size", "1"]  # fmt: skip
    for name in ("without", "with"):
        words = command(home, "sft", tmp_path / name, *flags)
        if name == "with":
            _output("run", *words[len(PROGRAM) :], "--use_liger_kernel", "true")
        else:
            run(words)
        rows = rundir.read_metrics(tmp_path / name)
        steps.append([row[key] for row in rows for key in ("loss", "grad_norm")])
    assert steps[1] == pytest.approx(steps[0], rel=1e-5)
    assert steps[1] != steps[0]


def test_a_cpu_is_told_in_one_line(tmp_path: Path) -> None:
    words = command(make_home(tmp_path), "sft", tmp_path / "run", "--train_iters", "1", *TOLD)
    said = run(words, status=2)
    assert "--use_liger_kernel: Liger's kernels are Triton programs for a GPU, and this rank computes on cpu" in said
    assert "--cross_entropy_loss_fusion" in said
