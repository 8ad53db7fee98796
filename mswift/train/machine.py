"""`mswift doctor machine`: what this machine has, and whether ranks on it meet and sum right. No torch here."""

import os
import platform
import tempfile
from pathlib import Path

import psutil

from mswift import rundir
from mswift.config.doctor import DoctorConfig
from mswift.launchers import local, preflight
from mswift.launchers.job import Job

_GIB = 2**30


def check_machine(config: DoctorConfig) -> int:
    """Print versions, cores, memory, GPUs, disk and the all_reduce of --nproc_per_node ranks; 1 where they fail."""
    gpus = [path.name for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]
    ranks = config.nproc_per_node or len(gpus) or 2
    free = preflight.facts(preflight.Expected(os.getcwd())).free_bytes
    memory = psutil.virtual_memory()
    rows = {
        "host": f"{platform.node()}, {platform.platform()}",
        "versions": ", ".join(f"{name} {version}" for name, version in preflight.versions().items()),
        "cores": f"{len(os.sched_getaffinity(0))} for this process, {os.cpu_count()} in all",
        "memory": f"{memory.available / _GIB:,.1f} GiB available of {memory.total / _GIB:,.1f}",
        "GPUs": " ".join(gpus) or "none",
        "disk": f"{free / _GIB:,.1f} GiB free in {os.getcwd()}",
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
