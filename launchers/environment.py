"""Which rank of which job this process is, from the variables that torchrun or SLURM set. A pure function."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mswift.errors import ConfigError

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000  # below the ephemeral ports that Linux hands out from 32768 on


@dataclass(frozen=True)
class RankInfo:
    """Place of a process in a job, and where rank 0 listens."""

    rank: int
    local_rank: int
    world_size: int
    master_addr: str
    master_port: int

    @classmethod
    def single(cls) -> "RankInfo":
        """The only rank of a job of one; port 0 lets the system choose."""
        return cls(rank=0, local_rank=0, world_size=1, master_addr="127.0.0.1", master_port=0)


def current(environ: Mapping[str, str] | None = None) -> RankInfo | None:
    """The rank that `environ` (default: os.environ) describes, or None outside any job.

    torchrun's variables come first. SLURM counts inside `srun` with more than one task; no ranks are the batch script
    itself (SLURM_PROCID=0, but no SLURM_STEP_ID) and the shells of salloc (no SLURM_PROCID, or a step of one task
    in a job of many). ConfigError names variables that are missing, no numbers or contradict each other.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env:
        return _from_torchrun(env)
    in_step = "SLURM_STEP_ID" in env or "SLURM_JOB_ID" not in env
    if "SLURM_PROCID" in env and in_step and _slurm_world_size(env) > 1:
        return _from_slurm(env)
    return None


def only_own_gpus(environ: Mapping[str, str] | None = None) -> bool:
    """Whether SLURM shows this rank only its own GPUs (--gpus-per-task, --gpu-bind), so that they count from 0 anew.

    A torchrun inside such a task shares the task's GPUs out among its ranks: False for them.
    """
    env = os.environ if environ is None else environ
    bind = env.get("SLURMD_TRES_BIND", "")
    return "RANK" not in env and any(kind in bind for kind in ("per_task:", "single:", "map_gpu:", "mask_gpu:"))


def _from_torchrun(env: Mapping[str, str]) -> RankInfo:
    missing = [name for name in _TORCHRUN if name not in env]
    if missing:
        raise ConfigError(
            f"RANK={env['RANK']} says that this process is one rank of a job, but {', '.join(missing)} is not set: "
            "start it with torchrun or --nproc_per_node, or unset RANK"
        )
    numbers = [_number(env, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")]
    rank, local_rank, world_size, port = numbers
    return _checked(RankInfo(rank, local_rank, world_size, env["MASTER_ADDR"], port), "RANK", "WORLD_SIZE")


def _from_slurm(env: Mapping[str, str]) -> RankInfo:
    world_size = _slurm_world_size(env)
    if "SLURM_NTASKS" in env and _number(env, "SLURM_NTASKS") != world_size:
        raise ConfigError(
            f"SLURM_STEP_NUM_TASKS={world_size} but SLURM_NTASKS={env['SLURM_NTASKS']}: the step's variables are left "
            "over from the srun that submitted this job; start with srun, or unset SLURM_STEP_ID to run alone"
        )
    info = RankInfo(
        rank=_number(env, "SLURM_PROCID"),
        local_rank=_number(env, "SLURM_LOCALID"),
        world_size=world_size,
        master_addr=env.get("MASTER_ADDR") or _slurm_first_node(env),
        master_port=_number(env, "MASTER_PORT") if "MASTER_PORT" in env else step_port(env),
    )
    return _checked(info, "SLURM_PROCID", "SLURM_NTASKS")


def step_port(env: Mapping[str, str], ahead: int = 0) -> int:
    """Where the ranks of this SLURM step meet, or of the one that is `ahead` of it in the job.

    Jobs with neighbouring numbers may share a node, a requeued one may meet its own past: 7919 is a prime.
    """
    job, step, restarts = (
        _number(env, name) if name in env else 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    )
    return _FIRST_PORT + (job * 7919 + step + ahead + restarts * 101) % _NUM_PORTS


def _slurm_first_node(env: Mapping[str, str]) -> str:
    """Where rank 0 is: on the first node of the step's list, unless tasks were placed by a host file."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ConfigError("SLURM_PROCID is set but neither SLURM_NODELIST nor MASTER_ADDR is: start with srun")
    if env.get("SLURM_DISTRIBUTION") == "arbitrary":
        raise ConfigError(
            f"SLURM_DISTRIBUTION=arbitrary: rank 0 need not be on the first of {nodes}; "
            "export MASTER_ADDR=the first line of SLURM_HOSTFILE, or leave --distribution out"
        )
    return first_host(nodes)


def _slurm_world_size(env: Mapping[str, str]) -> int:
    """Tasks of the step; in a shell of salloc SLURM_NTASKS is the job's."""
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    return _number(env, name) if name in env else 1


def first_host(nodelist: str) -> str:
    """First name of a SLURM node list: "gpu[003-010,012],login" -> "gpu003"."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodelist).split(",")[0]


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{name}={env.get(name)!r} is not a number; a launcher sets it") from error


def _checked(info: RankInfo, rank: str, size: str) -> RankInfo:
    if not 0 <= info.rank < info.world_size:
        raise ConfigError(f"{rank}={info.rank} does not fit {size}={info.world_size}: ranks count from 0")
    return info
