"""Before a run starts: what every node must have, what this one has, and what is wrong, by node, with the remedy.

The launcher writes `Expected` when it submits and checks the login node; the job's first step (mswift.parallel.check)
gathers `Facts` of all ranks and refuses together. No torch.
"""

import json
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import mswift
from mswift import rundir
from mswift.errors import ConfigError, MswiftError
from mswift.launchers.machine import Gpu

EXPECTED, REFUSED = "expected.json", "refused.json"
_PACKAGES = ("torch", "megatron-core", "transformers", "numpy")
_GIB = 2**30


@dataclass(frozen=True)
class Expected:
    """What a run needs of each node. Paths are absolute."""

    output_dir: str
    files: Mapping[str, int] = field(default_factory=dict)
    """Model and data: path -> bytes."""
    checkpoint_bytes: int = 0
    """One checkpoint, estimated from the model's table."""
    nproc_per_node: int = 1
    device: str = "auto"
    all_reduce_floor_gb_per_second: float | None = None


@dataclass(frozen=True)
class Facts:
    """What one rank found on its node."""

    host: str
    versions: Mapping[str, str]
    wrong_files: Mapping[str, str]
    """Path -> what is wrong with it."""
    cannot_write: str | None
    free_bytes: int
    no_port: str | None = None
    """Why the ranks of the run could not meet at this one, which is the first."""
    no_device: str | None = None
    """Why this rank has nothing to compute on."""
    gpus: Sequence[Gpu] = ()
    """Of the node, told by its first rank."""


def write(path: Path, expected: Expected) -> None:
    """Leave `expected` for the job."""
    path.write_text(json.dumps(asdict(expected)), encoding="utf-8")


def read(path: Path) -> Expected:
    """Inverse of `write`."""
    return Expected(**json.loads(path.read_text(encoding="utf-8")))


def facts(expected: Expected) -> Facts:
    """Look at this machine. Makes output_dir where it is missing."""
    return Facts(
        host=platform.node(),
        versions=versions(),
        wrong_files={path: wrong for path, size in expected.files.items() if (wrong := _wrong(Path(path), size))},
        cannot_write=_cannot_write(Path(expected.output_dir)),
        free_bytes=_free_bytes(Path(expected.output_dir)),
    )


def write_refusals(launch: Path, refusals: Sequence[str]) -> None:
    """Leave what was refused for the job's last word."""
    part = launch / f"{REFUSED}.{os.uname().nodename}.{os.getpid()}"  # several ranks may write at once
    part.write_text(json.dumps(list(refusals)), encoding="utf-8")
    part.rename(launch / REFUSED)


@contextmanager
def noting_refusals(run_dir: Path, rank: int) -> Iterator[None]:
    """In a job of `mswift launch slurm` a rank leaves a refused command for the job's last word; that of rank 0 counts.

    Its exit status does not suffice: srun reports that of a rank which it ended when the first was refused.
    """
    try:
        yield
    except MswiftError as error:
        launch = run_dir / rundir.LAUNCH
        if error.exit_status == ConfigError.exit_status and "SLURM_JOB_ID" in os.environ:
            with suppress(OSError):  # a directory without launch/ is no such job's
                if rank == 0 or not (launch / REFUSED).is_file():
                    write_refusals(launch, [str(error)])
        raise


def read_refusals(launch: Path) -> list[str]:
    """What was refused in the newest start, by its preflight or by the command; [] where nothing was."""
    path = launch / REFUSED
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []


def versions() -> dict[str, str]:
    """Python, mswift and the libraries that decide numbers; "absent" for one that is not installed."""
    found = {"python": platform.python_version(), "mswift": mswift.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def node_refusals(found: Facts, expected: Expected) -> Iterator[str]:
    """What is wrong on one node by itself."""
    here = f"node {found.host}: "
    for path, wrong in list(found.wrong_files.items())[:3]:
        yield f"{here}{path} {wrong}: put it where all nodes see it, or name another --model or --dataset"
    if len(found.wrong_files) > 3:
        yield f"{here}{len(found.wrong_files) - 3} more files are wrong"
    if found.cannot_write is not None:
        yield (
            f"{here}--output_dir {expected.output_dir} cannot be written ({found.cannot_write}): "
            "use one on a file system that all nodes share and you may write"
        )
    elif found.free_bytes < (need := 2 * expected.checkpoint_bytes):  # a new one grows beside the old
        yield (
            f"{here}--output_dir {expected.output_dir} has {found.free_bytes / _GIB:,.1f} GiB free; two checkpoints "
            f"are {need / _GIB:,.1f} GiB: free some, or use another --output_dir"
        )
    yield from (f"{here}{trouble}" for trouble in (found.no_port, found.no_device) if trouble is not None)
    for number, gpu in enumerate(found.gpus):
        if gpu.ecc_errors:
            yield (
                f"{here}GPU {number} ({gpu.name}) has {gpu.ecc_errors} uncorrected ECC errors: leave the node out "
                "(sbatch: [--exclude=...] in the site file) until it was reset"
            )


def job_refusals(ranks: Sequence[Facts], expected: Expected, num_nodes: int) -> list[str]:
    """What is wrong with the nodes together. ranks: facts of every rank, in the order of ranks."""
    refusals: dict[str, None] = {}
    for found in ranks:
        refusals |= dict.fromkeys(node_refusals(found, expected))
    first = ranks[0]
    for found in ranks:
        for name, version in found.versions.items():
            if version != first.versions.get(name):
                text = f"node {found.host}: {name} {version}, but node {first.host} has {first.versions.get(name)}"
                refusals[f"{text}: install the same on all nodes"] = None
    counts = Counter(found.host for found in ranks)
    if len(counts) != num_nodes:
        refusals[
            f"{len(ranks)} ranks are on {len(counts)} nodes ({', '.join(counts)}), {num_nodes} were asked for: start "
            "one torchrun per node, or a task per rank"
        ] = None
    for host, count in counts.items():
        if count != expected.nproc_per_node and len(counts) == num_nodes:
            refusals[
                f"node {host}: has {count} ranks, {expected.nproc_per_node} were asked for: see --nproc_per_node"
            ] = None
    return list(refusals)


def _wrong(path: Path, size: int) -> str | None:
    try:
        found = path.stat().st_size
        if not os.access(path, os.R_OK):
            return "cannot be read (permission denied)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if found == size else f"has {found:,} bytes, {size:,} where the job was submitted"


def _cannot_write(output_dir: Path) -> str | None:
    probe = output_dir / f".write-{platform.node()}-{os.getpid()}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        return error.strerror
    return None


def _free_bytes(output_dir: Path) -> int:
    while not output_dir.exists() and output_dir != output_dir.parent:
        output_dir = output_dir.parent
    return shutil.disk_usage(output_dir).free


def say(refusals: Sequence[str]) -> None:
    """Print refusals as a launch does."""
    for refusal in refusals:
        print(f"refused: {refusal}", file=sys.stderr, flush=True)
