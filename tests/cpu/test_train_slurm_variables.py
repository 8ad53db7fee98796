"""srun's variables are enough to train together: two processes with what a real SLURM set, no torchrun, no SLURM."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from mswift import rundir
from mswift.errors import ConfigError
from mswift.parallel import device
from tests.support import slurm
from tests.support.commands import command, make_home, run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("slurm"))


def start(argv: list[str], rank: int) -> "subprocess.Popen[str]":
    """`argv` as task `rank` of the recorded step of two; the node n2 is this machine, the job number this process."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER_"))}
    environ = {**outside, **slurm.task_on_second_node(rank), "SLURM_STEP_NODELIST": "localhost"}
    environ["SLURM_JOB_ID"] = str(os.getpid())  # a port of its own
    return subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_tasks_train_one_step_together_as_one_process_does(home: Path) -> None:
    run(command(home, "sft", home / "alone", "--train_iters", "1"))
    argv = command(home, "sft", home / "slurm", "--train_iters", "1", "--tensor_model_parallel_size", "2")
    tasks = [start(argv, rank) for rank in range(2)]
    try:
        outputs = [task.communicate(timeout=120)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "2 ranks = TP 2 x PP 1 x DP 1" in outputs[0]
    assert "layout" not in outputs[1]  # only rank 0 speaks
    assert rundir.committed_steps(home / "slurm") == [1]
    alone, together = (rundir.read_metrics(home / name)[0] for name in ("alone", "slurm"))
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)


def test_each_task_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in slurm.task(1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.resolve() == torch.device("cuda", 1)  # --gpus-per-node=2: both are seen
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="process 1 has no GPU of its own.*--ntasks-per-node=1"):
        device.resolve()
    monkeypatch.setenv("SLURMD_TRES_BIND", "gpu:per_task:1")
    assert device.resolve() == torch.device("cuda", 0)  # --gpus-per-task=1: each sees one, as number 0
