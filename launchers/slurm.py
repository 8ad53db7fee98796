"""A SLURM job as a value, and the sbatch script that it means. Nothing is started; no shell text is made of input.

Values reach the script through two filters: `sh` (shlex.quote) where bash reads them, `sbatch` where sbatch does.
"""

import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jinja2

import mswift
from mswift.errors import ConfigError
from mswift.launchers.site import Site

TEMPLATES = Path(mswift.__file__).parent / "slurm"
_NODES = re.compile(r"(\d+)(?:-(\d+))?")
_TIME = re.compile(r"\d+|(\d+-)?\d+(:\d\d){0,2}")
_PLAIN = re.compile(r"[\w.,:@=+/%-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """One sbatch script. Paths are absolute; the recipe lies in run_dir/launch (of a sweep: run_dir/N/launch)."""

    command: Literal["pt", "sft"]
    run_dir: Path
    folder: Path
    """Where relative paths of the recipe count from."""
    name: str
    nodes: str
    nproc_per_node: int
    site: Site = field(default_factory=Site)
    ranks: Literal["torchrun", "srun"] = "torchrun"
    time: str | None = None
    signal_seconds: int = 600
    requeue: bool = True
    singleton: bool = False
    preflight: bool = True
    num_points: int = 0
    """Jobs of an array; 0: no array."""
    points_at_a_time: int | None = None

    def __post_init__(self) -> None:
        node_counts(self.nodes)
        if self.nproc_per_node < 1:
            raise ConfigError(f"--nproc_per_node {self.nproc_per_node}: a node runs at least one rank")
        gpus = self.site.gpus_per_node
        if gpus and self.nproc_per_node > gpus:
            raise ConfigError(
                f"--nproc_per_node {self.nproc_per_node}: a rank takes a GPU, and the site's nodes have {gpus}: "
                f"use at most --nproc_per_node {gpus}, or correct gpus_per_node in the site file"
            )
        if self.time is not None:
            self._check_time(self.time)
        if self.signal_seconds < 1 or self.signal_seconds > 65_535:
            raise ConfigError(f"--signal_seconds {self.signal_seconds}: SLURM takes 1 to 65535 seconds")
        if any(char in str(self.run_dir) for char in "\\%"):
            raise ConfigError(f"--output_dir {self.run_dir}: SLURM writes no log below a name with a backslash or %")

    def _check_time(self, time: str) -> None:
        if not _TIME.fullmatch(time):
            raise ConfigError(f"--time {time}: write minutes, 12:00:00 or 2-00:00:00")
        if seconds_of(time) <= self.signal_seconds:
            raise ConfigError(
                f"--time {time} is not longer than --signal_seconds {self.signal_seconds}, so that the run would be "
                f"told to stop when it starts: use a longer --time or a smaller --signal_seconds"
            )

    @property
    def is_range(self) -> bool:
        """Whether SLURM may choose the number of nodes; one that hears of tasks then gives the fewest (22.05)."""
        return len(node_counts(self.nodes)) > 1

    @property
    def cpus_per_node(self) -> int:
        """Cores that a node must have."""
        return self.site.cpus_per_rank * self.nproc_per_node

    @property
    def tasks_per_node(self) -> int:
        """Tasks that srun starts on a node."""
        return 1 if self.ranks == "torchrun" else self.nproc_per_node

    @property
    def cpus_per_task(self) -> int:
        """Cores of such a task."""
        return self.cpus_per_node // self.tasks_per_node

    @property
    def script(self) -> Path:
        """Where the script is saved."""
        return self.run_dir / "launch" / "job.sbatch"

    @property
    def log(self) -> str:
        """sbatch's pattern of the log's name: %j is the job, %A_%a job and index of an array."""
        number = "%A_%a" if self.num_points else "%j"
        return f"{self.run_dir}/launch/log-{number}.txt"


def node_counts(nodes: str) -> range:
    """The numbers of nodes that "4" or "2-4" allows. ConfigError for anything else."""
    match = _NODES.fullmatch(nodes)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise ConfigError(f"--nodes {nodes}: write a number of nodes, or the least and the most, as 2-4")
    return range(low, high + 1)


def seconds_of(time: str) -> int:
    """Seconds of a time limit: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    units = (3600, 60, 1) if dash else {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(parts)]
    return int(days or 0) * 86_400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


def sbatch_word(value: object) -> str:
    """`value` as one word of an #SBATCH line: in double quotes, where only `"` and a backslash need one before them."""
    text = str(value)
    if not text.isprintable():
        raise ConfigError(f"{text!r} cannot stand in an sbatch script: it has a control character")
    if _PLAIN.fullmatch(text):
        return text
    inside = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{inside}"'


def _array_word(text: str) -> str:
    """One word of a bash array; one with a comma is quoted too, which shlex does not think needed but readers may."""
    quoted = shlex.quote(text)
    return f"'{text}'" if quoted == text and "," in text else quoted


def render(job: SlurmJob, python: str | None = None) -> str:
    """The sbatch script of `job`. `python`: the interpreter, if neither the site nor a container says."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"sh": lambda value: shlex.quote(str(value)), "sbatch": sbatch_word}
    interpreter = job.site.python or python or ("python3" if job.site.container else sys.executable)
    seen = job.folder, job.run_dir
    program = " ".join(map(_array_word, (*job.site.prefix(*seen), interpreter)))
    options = "".join(f" {_array_word(option)}" for option in job.site.srun_options(*seen))
    return environment.get_template("job.sbatch.j2").render(
        job=job, version=mswift.__version__, options=options, program=program
    )
