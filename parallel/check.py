"""All ranks of a job before it trains: same versions, files and disk on every node, distinct hosts, a fast right sum.

A process of every rank, started as the ranks of the run are: `python -m mswift.parallel.check RUN_DIR`.
"""

import contextlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from mswift import rundir
from mswift.errors import ConfigError
from mswift.launchers import machine, preflight
from mswift.launchers.environment import RankInfo, current, step_port
from mswift.parallel import device as devices
from mswift.parallel import groups
from mswift.topology import ParallelDims

_TIMEOUT_SECONDS = 120.0
_BYTES = {"cuda": 256 << 20, "cpu": 8 << 20}
_ROUNDS = 5
_REFUSED = 2


def check(expected: preflight.Expected, info: RankInfo, num_nodes: int) -> list[str]:
    """Refusals, the same on all ranks; rank 0 prints what was measured."""
    started = time.perf_counter()
    # They talk over gloo first: a GPU or a library that one node lacks is then told by its name.
    groups.init(ParallelDims(info.world_size), torch.device("cpu"), info, _TIMEOUT_SECONDS)
    device, facts = _look(expected, info)
    found: list[preflight.Facts | None] = [None] * info.world_size
    dist.all_gather_object(found, facts)
    ranks = [facts for facts in found if facts is not None]
    refusals = preflight.job_refusals(ranks, expected, num_nodes)
    if any(facts.no_device for facts in ranks):
        return refusals
    wrong, speed = all_reduce(device, info)
    if wrong:
        refusals.append(f"all_reduce over {info.world_size} ranks gave {wrong}: the network or its library is broken")
    floor = expected.all_reduce_floor_gb_per_second
    if floor is not None and speed is not None and speed < floor:
        hosts = " ".join(dict.fromkeys(facts.host for facts in ranks))
        refusals.append(
            f"all_reduce over {hosts} reaches {speed:.1f} GB/s, the site file asks for {floor:g}: check the network "
            "variables of the site file (NCCL_SOCKET_IFNAME, NCCL_IB_HCA), or leave a slow node out (--exclude)"
        )
    if info.rank == 0:
        bandwidth = "" if speed is None else f", all_reduce {speed:.2f} GB/s"
        versions = " ".join(f"{name} {version}" for name, version in ranks[0].versions.items())
        nodes = len({facts.host for facts in ranks})
        print(
            f"preflight: {info.world_size} ranks on {nodes} nodes, {device.type}{bandwidth}, "
            f"{time.perf_counter() - started:.1f} s; {versions}",
            flush=True,
        )
    return refusals


def _look(expected: preflight.Expected, info: RankInfo) -> tuple[torch.device, preflight.Facts]:
    """This rank's device (the CPU where it has none of its own) and what it found on its node."""
    facts = preflight.facts(expected)
    if info.local_rank == 0 and (gpus := machine.gpus()):
        facts = replace(facts, gpus=gpus, versions={**facts.versions, "driver": gpus[0].driver})
    port = _port_of_the_run() if info.rank == 0 and info.world_size > 1 else None
    if port is not None:
        facts = replace(facts, no_port=machine.port_refusal(port))
    try:
        device = devices.resolve(expected.device)
    except ConfigError as error:
        return torch.device("cpu"), replace(facts, no_device=str(error))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device, facts


def _port_of_the_run() -> int | None:
    """Where the ranks of the next step, which trains, will meet; None where that is not SLURM's to say."""
    here = os.environ
    if "SLURM_STEP_ID" not in here or here.get("MASTER_PORT", str(step_port(here))) != str(step_port(here)):
        return None  # a port that the site file names is the one that these ranks have met at
    return step_port(here, ahead=1)


def all_reduce(device: torch.device, info: RankInfo) -> tuple[str | None, float | None]:
    """What is wrong with a sum over all ranks, and its bus bandwidth in GB/s (None for one rank).

    Bus bandwidth: 2 (n - 1) / n x bytes / seconds, which does not depend on the number of ranks n; the slowest rank's.
    """
    size = info.world_size
    if device.type == "cuda":
        group = dist.new_group(backend=devices.backend(device), device_id=device)
    else:
        group = dist.group.WORLD
    ones = torch.full((_BYTES[device.type] // 4,), float(info.rank + 1), device=device)
    dist.all_reduce(ones, group=group)
    want, low, high = size * (size + 1) / 2, float(ones.min()), float(ones.max())
    wrong = None if low == high == want else f"{low:g} to {high:g} instead of {want:g}"
    seconds = []
    for _ in range(_ROUNDS):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(ones, group=group)
        devices.synchronize(device)
        seconds.append(time.perf_counter() - started)
    slowest = torch.tensor(min(seconds))
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if size == 1:
        return wrong, None
    return wrong, 2 * (size - 1) / size * _BYTES[device.type] / float(slowest) / 1e9


def main(run_dir: Path) -> int:
    """Check as one rank; 2 where the run is refused, 1 where the ranks did not meet."""
    expected = preflight.read(run_dir / rundir.LAUNCH / preflight.EXPECTED)
    info = current() or RankInfo.single()
    try:
        refusals = check(expected, info, int(os.environ.get("SLURM_JOB_NUM_NODES", "1")))
    except RuntimeError as error:  # which may be another's fault, or the network's of a moment: the job tries again
        print(
            f"failed: node {os.uname().nodename}, rank {info.rank}: no job of {info.world_size} ranks within "
            f"{_TIMEOUT_SECONDS:.0f} s ({str(error).splitlines()[0]}): look for a firewall between the nodes, or set "
            "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME in the site file",
            file=sys.stderr,
            flush=True,
        )
        return 1
    if info.rank == 0 and refusals:
        preflight.say(refusals)
        with contextlib.suppress(OSError):  # a disk that is full or read-only is among them
            preflight.write_refusals(run_dir / rundir.LAUNCH, refusals)
    groups.destroy()
    return _REFUSED if refusals else 0


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a peer that is gone must not be waited for
