"""What a launch is: the frozen dataclass behind `mswift launch`. What is trained is a recipe, and flags beside it."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mswift.config.schema import FOR_OTHERS


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Start a recipe on this machine, on machines by hand, or on a SLURM cluster, and follow the jobs of a run.

    launch local RECIPE runs it here; launch torchrun RECIPE prints each node's command; launch slurm RECIPE checks it
    and submits it. launch status, logs or cancel RUN_DIR speak of the jobs that launch slurm submitted for a run.
    Flags that are not listed here are those of the training command and win over the recipe: --lr 1e-5.
    """

    action: Annotated[Literal["local", "torchrun", "slurm", "status", "logs", "cancel"], tyro.conf.Positional]
    """Where to start it, or what to do with the jobs of a run."""
    target: Annotated[str, tyro.conf.Positional]
    """RECIPE.yaml; for status, logs and cancel the run's --output_dir."""
    command: Literal["pt", "sft"] | None = None
    """What the recipe is for. Default: what the recipe says (`command: sft`)."""
    dry_run: bool = False
    """Check everything, print what would run, start nothing."""

    # -- machines
    nodes: str = "1"
    """Machines; slurm: 2-4 takes what is free, where the layout follows (its data-parallel size changes)."""
    nproc_per_node: int | None = None
    """Ranks of a machine. Default: slurm, the site's gpus_per_node; else 1."""
    master_addr: str | None = None
    """torchrun: the first node, as the others reach it."""
    master_port: int = 29500
    """torchrun: a free port there."""

    # -- slurm
    site: str | None = None
    """YAML file of the cluster: partition, account, container, network. Default: $MSWIFT_SITE, or SLURM's defaults."""
    ranks: Literal["torchrun", "srun"] = "torchrun"
    """One torchrun per node that starts the ranks, or one srun task per rank."""
    time: str | None = None
    """Time limit, as 12:00:00 or 2-00:00:00. Default: the site's, else the partition's."""
    job_name: str | None = None
    """Default: mswift- and the name of the run's directory."""
    signal_seconds: int = 600
    """The run is told this long before its time limit to save and stop; longer than a step and a save."""
    requeue: bool = True
    """A stopped or failed job is queued again while new checkpoints appear, and by SLURM after a lost node."""
    max_restarts: int = 100
    """Starts again of one job, after which it ends."""
    max_idle_restarts: int = 2
    """Starts in a row without a new checkpoint, after which a job ends."""
    chain: int = 1
    """Jobs that are submitted at once and run one after the other, for sites with short time limits."""
    sweep: tuple[str, ...] = ()
    """Values of flags, all combinations as a job array: lr=1e-5,2e-5 seed=1,2. Each has its own output_dir/N."""
    sweep_limit: int | None = None
    """Jobs of a sweep that run at a time. Default: all."""
    preflight: bool = True
    """The job's first step checks files, disk, versions and the network of its nodes."""

    training: Annotated[tuple[str, ...], tyro.conf.Suppress, FOR_OTHERS] = ()
    """Flags of the training command, as they were given."""
