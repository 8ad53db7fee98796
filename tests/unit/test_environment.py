"""Which rank this process is: torchrun's variables, SLURM's, neither, and broken ones."""

import pytest

from mswift.errors import ConfigError
from mswift.launchers.environment import RankInfo, current, first_host

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


def test_a_step_may_have_fewer_tasks_than_the_job() -> None:
    info = current({**SLURM, "SLURM_PROCID": "1", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "2"})
    assert info is not None
    assert info.world_size == 2


@pytest.mark.parametrize(
    "environ",
    [{}, {"WORLD_SIZE": "4"}, {**SLURM, "SLURM_NTASKS": "1"}, {**SLURM, "SLURM_JOB_ID": "123"}],
    ids=["nothing", "no rank", "one task", "batch script"],
)
def test_outside_a_job(environ: dict[str, str]) -> None:
    assert current(environ) is None


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
