"""`mswift doctor machine`: what this machine has, and whether ranks on it meet and sum right. No torch here."""

import os
import platform
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

from mswift import rundir
from mswift.config.doctor import DoctorConfig
from mswift.launchers import local, machine, preflight
from mswift.launchers.job import Job

_GIB = 2**30


def check_machine(config: DoctorConfig) -> int:
    """Print what this machine has, and the all_reduce of --nproc_per_node ranks on it; 1 where they fail.

    Files that the driver made in /dev count where nvidia-smi is missing.
    """
    gpus = machine.gpus()
    num_gpus = len(gpus) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    ranks = config.nproc_per_node or num_gpus or 2
    here = preflight.facts(preflight.Expected(os.getcwd()))
    memory = psutil.virtual_memory()
    rows = {
        "host": f"{platform.node()}, {platform.platform()}",
        "versions": ", ".join(f"{name} {version}" for name, version in preflight.versions().items()),
        "cores": f"{len(os.sched_getaffinity(0))} for this process, {os.cpu_count()} in all",
        "memory": f"{memory.available / _GIB:,.1f} GiB available of {memory.total / _GIB:,.1f}",
        "GPUs": _gpus(gpus) if gpus else f"{num_gpus or 'none'}{', nvidia-smi is missing' * bool(num_gpus)}",
        "networks": ", ".join(machine.networks()) or "none is up",
        "disk": f"{here.free_bytes / _GIB:,.1f} GiB free in {os.getcwd()}, {_disk_speed(here)}",
    }
    for name, text in rows.items():
        print(f"{name:<11}{text}", flush=True)
    with tempfile.TemporaryDirectory(prefix="mswift-doctor-") as home:
        (Path(home) / rundir.LAUNCH).mkdir()
        expected = preflight.Expected(home, nproc_per_node=ranks, device=config.device)
        preflight.write(Path(home) / rundir.LAUNCH / preflight.EXPECTED, expected)
        status = local.run(Job(ranks, "mswift.parallel.check", (home,)))
    print(f"{'sound' if status == 0 else 'not sound'}: {ranks} ranks on this machine", flush=True)
    return int(status != 0)


def _gpus(found: Sequence[machine.Gpu]) -> str:
    kinds = Counter((gpu.name, gpu.memory, gpu.driver) for gpu in found)
    sick = [
        f"GPU {number} has {gpu.ecc_errors} uncorrected ECC errors"
        for number, gpu in enumerate(found)
        if gpu.ecc_errors
    ]
    return "; ".join(
        [*(f"{count} x {name}, {memory}, driver {driver}" for (name, memory, driver), count in kinds.items()), *sick]
    )


def _disk_speed(here: preflight.Facts) -> str:
    if here.cannot_write is not None:
        return f"cannot be written ({here.cannot_write})"
    return f"{machine.bytes_per_second_written(Path.cwd()) / 1e6:,.0f} MB/s written"
