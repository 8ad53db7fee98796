"""`mswift launch`: a recipe becomes a job here, commands for machines, or a SLURM job; and what becomes of that job."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path

from mswift.cli import options
from mswift.cli.commands import COMMANDS, load
from mswift.config.launch import LaunchConfig
from mswift.config.loader import recipe_command, to_arguments
from mswift.config.train import TrainConfig
from mswift.errors import ConfigError
from mswift.launchers.job import COMMAND_LINE, Job, Meeting
from mswift.launchers.slurm import node_counts

_COMMANDS = ("pt", "sft")


def main(config: LaunchConfig) -> int:
    """Do what `config.action` says; the exit status."""
    if config.action in ("status", "logs", "cancel"):
        from mswift.launchers import jobs

        if config.training:
            raise ConfigError(f"launch {config.action} takes no {config.training[0]}")
        return int(getattr(jobs, config.action)(Path(config.target)))
    command = command_of(config)
    if config.action == "slurm":
        from mswift.cli.launch_slurm import launch

        return launch(config, command)
    _refuse_slurm_flags(config)
    return _local(config, command) if config.action == "local" else _torchrun(config, command)


def command_of(config: LaunchConfig) -> str:
    """pt or sft, by --command or by the recipe. ConfigError where neither says, or they contradict."""
    recipe = Path(config.target)
    if not recipe.is_file():
        raise ConfigError(f"recipe {recipe} does not exist; launch {config.action} takes a YAML file")
    said = recipe_command(recipe)
    if said is None and config.command is None:
        raise ConfigError(f"recipe {recipe} does not say what it is for: add `command: sft` (or pt), or --command sft")
    command = config.command or said
    if command not in _COMMANDS:
        raise ConfigError(f"recipe {recipe}: command {command}; launch starts {' or '.join(_COMMANDS)}")
    return str(command)


def training_config(config: LaunchConfig, command: str, *flags: str) -> TrainConfig:
    """The recipe with the flags beside it, and then `flags`. ConfigError as the training command's own."""
    for given in config.training:
        name = given.partition("=")[0].replace("-", "_").lstrip("_")
        if given.startswith("--") and name == "world_size":
            raise ConfigError("--world_size follows from --nodes and --nproc_per_node; leave it out")
    kind = load(COMMANDS[command].config)
    training: TrainConfig = options.parse(kind, [config.target, *config.training, *flags])
    if training.nproc_per_node is not None:
        raise ConfigError(f"recipe {config.target}: nproc_per_node belongs to the launch: --nproc_per_node")
    return training


def _refuse_slurm_flags(config: LaunchConfig) -> None:
    for name in ("site", "time", "job_name", "sweep", "sweep_limit", "chain", "ranks"):
        if getattr(config, name) != LaunchConfig.__dataclass_fields__[name].default:
            raise ConfigError(f"--{name} is for SLURM: use `mswift launch slurm`, or leave it out")


def _local(config: LaunchConfig, command: str) -> int:
    if config.nodes != "1":
        raise ConfigError(f"--nodes {config.nodes}: launch local is one machine; use launch torchrun or launch slurm")
    training = replace(training_config(config, command), nproc_per_node=config.nproc_per_node or 1)
    return int(load(COMMANDS[command].run)(replace(training, dry_run=training.dry_run or config.dry_run)))


def _torchrun(config: LaunchConfig, command: str) -> int:
    """Print the command of each node, after the refusals of the layout."""
    counts = node_counts(config.nodes)
    if len(counts) > 1:
        raise ConfigError(f"--nodes {config.nodes}: torchrun needs one number; a range is for launch slurm")
    training = training_config(config, command)
    meeting = Meeting(config.master_addr, config.master_port) if config.master_addr is not None else None
    job = Job(config.nproc_per_node or 1, COMMAND_LINE, (command, *to_arguments(training)), counts[0], meeting)
    if refused(training, [job.world_size]):
        return ConfigError.exit_status
    for node in range(job.num_nodes):
        print(f"# node {node}{' (' + shlex.quote(meeting.master_addr) + ')' if meeting and node == 0 else ''}")
        print(shlex.join(job.argv(node)))
    return 0


def refused(training: TrainConfig, world_sizes: list[int]) -> bool:
    """Whether a launch on any of these numbers of ranks would be refused; the reasons go to stderr."""
    from mswift.train.dry_run import launch_refusals

    found = {str(refusal): size for size in reversed(world_sizes) for refusal in launch_refusals(training, size)}
    for refusal, size in found.items():
        where = f" on {size} ranks" if len(world_sizes) > 1 else ""
        print(f"refused{where}: {refusal}", file=sys.stderr)
    return bool(found)
