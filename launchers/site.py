"""What differs between clusters, apart from the recipe: partition, machines, network, container. A strict YAML file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mswift.config.loader import from_dict
from mswift.errors import ConfigError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Site:
    """One cluster. None: what SLURM does by itself."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    time: str | None = None
    """Time limit, as 12:00:00, for launches that name none."""
    gpus_per_node: int = 8
    """0: no GPUs are asked for."""
    cpus_per_rank: int = 8
    """Cores of a rank; ranks of a node x this fit the node."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch: --exclude=n13, --switches=1."""
    setup: tuple[str, ...] = ()
    """Lines of shell, as they are, before anything is started: module load cuda."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Variables of all ranks: NCCL_SOCKET_IFNAME, NCCL_IB_HCA."""
    python: str | None = None
    """Interpreter that has mswift, on every node or in the image. Default: the one that launches, or python3."""
    container: Literal["pyxis", "apptainer"] | None = None
    image: str | None = None
    """What the container starts from: /images/mswift.sqsh, /images/mswift.sif, docker://..."""
    mounts: tuple[str, ...] = ()
    """Folders of the node that the container sees: /data:/data."""
    container_options: tuple[str, ...] = ()
    """Further options of srun (pyxis) or `apptainer exec`."""
    all_reduce_floor_gb_per_second: float | None = None
    """Preflight refuses nodes whose all_reduce is slower (bus bandwidth, GB/s)."""

    def __post_init__(self) -> None:
        for name in self.environment:
            if not _NAME.fullmatch(name):
                raise ConfigError(f"site file: environment has {name!r}, which is no name of a variable; letters and _")
        for option in self.sbatch:
            if not option.startswith("-"):
                raise ConfigError(f"site file: sbatch has {option!r}, which is no option; write --name=value")
        if (self.container is None) != (self.image is None):
            given = "container" if self.image is None else "image"
            raise ConfigError(
                f"site file: {given} is given alone; container (pyxis or apptainer) and image belong together"
            )
        if self.container is None and (self.mounts or self.container_options):
            raise ConfigError("site file: mounts and container_options need container and image")
        if self.cpus_per_rank < 1 or self.gpus_per_node < 0:
            raise ConfigError(
                f"site file: cpus_per_rank {self.cpus_per_rank}, gpus_per_node {self.gpus_per_node}: "
                "a rank needs a core, and GPUs are 0 or more"
            )

    def srun_options(self, folder: Path, run_dir: Path) -> tuple[str, ...]:
        """Options of every srun. In a container it runs in `folder`, and sees it and `run_dir` as the node does."""
        if self.container != "pyxis":
            return ()
        mounts = ",".join(self._mounts(folder, run_dir))
        places = (f"--container-mounts={mounts}", f"--container-workdir={folder}")
        return (f"--container-image={self.image}", *places, *self.container_options)

    def prefix(self, folder: Path, run_dir: Path) -> tuple[str, ...]:
        """What stands before the interpreter in every srun."""
        if self.container != "apptainer":
            return ()
        gpus = ("--nv",) if self.gpus_per_node else ()
        places = (f"--bind={','.join(self._mounts(folder, run_dir))}", f"--pwd={folder}")
        return ("apptainer", "exec", *gpus, *places, *self.container_options, str(self.image))

    def _mounts(self, *needed: Path) -> list[str]:
        """The site's, and those of `needed` that lie in none of them."""
        mounts = list(self.mounts)
        for path in needed:
            if any(char in str(path) for char in ",:"):
                raise ConfigError(f"{path}: a container cannot see a folder with , or : in its name: rename it")
            same = [source for source, *target in (m.split(":") for m in mounts) if target[:1] in ([], [source])]
            if not any(path.is_relative_to(source) for source in same):
                mounts.append(f"{path}:{path}")
        return mounts


def read_site(path: Path) -> Site:
    """The site that a file describes; ConfigError names the file and what is wrong with it."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"site file {path} cannot be read: {' '.join(str(error).split())}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"site file {path} must be a mapping of names to values, as in `partition: gpu`")
    try:
        return from_dict(Site, values)
    except ConfigError as error:
        raise ConfigError(f"site file {path}: {str(error).removeprefix('site file: ')}") from error
