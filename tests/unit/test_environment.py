"""Which rank this process is: torchrun's variables, SLURM's, neither, and broken ones.

What SLURM sets was recorded from a real one (tests/support/slurm.py).
"""

import pytest

from mswift.cli.main import main
from mswift.errors import ConfigError
from mswift.launchers.environment import RankInfo, current, first_host, only_own_gpus
from tests.support import slurm

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29511"}
SLURM = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_NODELIST": "gpu[07-08]"}


def test_torchrun_wins_over_slurm() -> None:
    assert current({**SLURM, **TORCHRUN}) == RankInfo(3, 1, 4, "10.0.0.1", 29511)


def test_slurm() -> None:
    info = current({**SLURM, "SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0"})
    assert info is not None
    assert (info.rank, info.local_rank, info.world_size, info.master_addr) == (3, 1, 4, "gpu07")
    assert 20_000 <= info.master_port < 32_768
    assert current({**SLURM, "MASTER_ADDR": "h", "MASTER_PORT": "5"}) == RankInfo(3, 1, 4, "h", 5)
    assert current(SLURM) is not None


def test_all_ranks_of_a_step_meet_at_one_place() -> None:
    step = {**SLURM, "SLURM_JOB_ID": "123", "SLURM_STEP_ID": "2"}
    infos = [current({**step, "SLURM_PROCID": str(rank)}) for rank in range(4)]
    assert len({(info.master_addr, info.master_port) for info in infos if info}) == 1
    other = current({**step, "SLURM_STEP_ID": "3"})
    assert other is not None
    assert infos[0] is not None
    assert other.master_port != infos[0].master_port


def test_tasks_of_srun_on_two_nodes() -> None:
    infos = [current(slurm.task(rank)) for rank in range(4)]
    assert infos == [RankInfo(rank, rank % 2, 4, "n1", 27_919) for rank in range(4)]


def test_a_step_smaller_than_the_job_meets_on_its_own_first_node() -> None:
    infos = [current(slurm.task_on_second_node(rank)) for rank in range(2)]
    assert infos == [RankInfo(rank, rank, 2, "n2", 27_924) for rank in range(2)]


def test_ports_of_neighbouring_jobs_steps_and_restarts_differ() -> None:
    places = [
        {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(restarts)}
        for job in range(8_000_000, 8_000_020)
        for step in range(10)
        for restarts in range(3)
    ]
    infos = [current({**slurm.task(0), **place}) for place in places]
    assert len({info.master_port for info in infos if info}) == len(places)
    assert all(20_000 <= info.master_port < 32_000 for info in infos if info)


@pytest.mark.parametrize(
    "environ",
    [
        {}, {"WORLD_SIZE": "4"}, {**SLURM, "SLURM_NTASKS": "1"}, slurm.BATCH_SCRIPT, slurm.SALLOC_SHELL,
        slurm.INTERACTIVE_STEP,
    ],
    ids=["nothing", "no rank", "one task", "batch script", "salloc", "interactive step"],
)  # fmt: skip
def test_outside_a_job(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert current(environ) is None
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["verify", "absent-a", "absent-b"]) != 0
    assert "[rank" not in capsys.readouterr().err


def test_a_batch_script_with_the_variables_of_another_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"SLURM_STEP_NUM_TASKS=2 but SLURM_NTASKS=4.*unset SLURM_STEP_ID"):
        current(slurm.BATCH_SCRIPT_FROM_A_STEP)
    assert current({k: v for k, v in slurm.BATCH_SCRIPT_FROM_A_STEP.items() if k != "SLURM_STEP_ID"}) is None


def test_tasks_placed_by_a_host_file_need_an_address() -> None:
    with pytest.raises(ConfigError, match=r"SLURM_DISTRIBUTION=arbitrary.*export MASTER_ADDR"):
        current(slurm.ARBITRARY)
    info = current({**slurm.ARBITRARY, "MASTER_ADDR": "n2"})
    assert info is not None
    assert (info.rank, info.master_addr) == (0, "n2")


def test_tasks_that_see_only_their_own_gpus() -> None:
    for bind in ("gpu:per_task:1", "gpu:single:1", "gpu:map_gpu:0,1"):  # --gpus-per-task=1, --gpu-bind=...
        assert only_own_gpus({**slurm.task(1), "SLURMD_TRES_BIND": bind})
        assert not only_own_gpus({**slurm.task(1), "SLURMD_TRES_BIND": bind, **TORCHRUN})  # torchrun in one task
    for other in ({}, {"SLURMD_TRES_BIND": "gpu:closest"}, {"SLURMD_TRES_BIND": "gpu:none"}):
        assert not only_own_gpus({**slurm.task(1), **other})  # --gpus-per-node


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set"),
        ({**TORCHRUN, "WORLD_SIZE": "x"}, "WORLD_SIZE='x' is not a number"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4 does not fit WORLD_SIZE=4"),
        ({**SLURM, "SLURM_NODELIST": ""}, "neither SLURM_NODELIST nor MASTER_ADDR"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID=None"),
    ],
)
def test_broken_variables_are_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        current(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[003-010,012],x", "gpu003"), ("r[1-2]n[04,07]", "r1n04"), ("a[5]", "a5")],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host
