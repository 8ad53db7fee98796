"""`mswift launch slurm`: recipe + site -> checked -> script and resolved recipes in the run directory -> sbatch."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from blake3 import blake3

from mswift.cli.launch import refused, training_config
from mswift.config.launch import LaunchConfig
from mswift.config.train import TrainConfig
from mswift.errors import ConfigError
from mswift.launchers import jobs, preflight
from mswift.launchers.preflight import Expected
from mswift.launchers.site import Site, read_site
from mswift.launchers.slurm import SlurmJob, node_counts, render
from mswift.launchers.survive import Limits
from mswift.train.dry_run import needs_of

_SITE_VARIABLE = "MSWIFT_SITE"


def launch(config: LaunchConfig, command: str) -> int:
    """Check, then submit or (dry run) print the script; the exit status."""
    site = _site(config)
    runs = list(_runs(config, command))
    job = _job(config, command, site, Path(runs[0].output_dir if not config.sweep else _parent(runs[0])))
    sizes = [nodes * job.nproc_per_node for nodes in node_counts(job.nodes)]
    refusals = [refused(run, sizes) for run in runs]  # all of them are told
    if any(refusals):
        return ConfigError.exit_status
    script = render(job)
    if config.dry_run:
        print(script, end="")
        return 0
    limits = Limits(config.max_restarts, config.max_idle_restarts)
    plans = [jobs.Run(run, _expected(run, job), limits) for run in runs]
    if config.preflight and any([_is_unfit(plan.expected) for plan in plans]):  # noqa: C419 - all of them are told
        return ConfigError.exit_status
    numbers = jobs.submit(job, script, plans, config.chain)
    print(f"submitted {' '.join(numbers)}: {job.script}")
    print(f"follow it: mswift launch status {job.run_dir}; mswift launch logs {job.run_dir}")
    return 0


def _expected(run: TrainConfig, job: SlurmJob) -> Expected:
    files, checkpoint_bytes = needs_of(run)
    return Expected(
        output_dir=str(Path(run.output_dir).absolute()),
        files=files,
        checkpoint_bytes=checkpoint_bytes,
        nproc_per_node=job.nproc_per_node,
        device=run.device,
        all_reduce_floor_gb_per_second=job.site.all_reduce_floor_gb_per_second,
    )


def _is_unfit(expected: Expected) -> bool:
    """Whether this machine, which sees what the nodes see, shows that the run cannot work; the reasons go to stderr."""
    refusals = list(preflight.node_refusals(preflight.facts(expected), expected))
    preflight.say(refusals)
    return bool(refusals)


def _site(config: LaunchConfig) -> Site:
    path = config.site or os.environ.get(_SITE_VARIABLE)
    return read_site(Path(path)) if path else Site()


def _runs(config: LaunchConfig, command: str) -> Iterator[TrainConfig]:
    """The configuration of the run, or of each point of a sweep, in output_dir/N."""
    if not config.sweep:
        yield training_config(config, command)
        return
    axes = []
    for item in config.sweep:
        name, equals, values = item.partition("=")
        if not (name and equals and values):
            raise ConfigError(f"--sweep {item}: write a flag's name and its values, as lr=1e-5,2e-5")
        axes.append([f"--{name}={value}" for value in values.split(",")])
    for number, flags in enumerate(itertools.product(*axes)):
        run = training_config(config, command, *flags)
        yield replace(run, output_dir=str(Path(run.output_dir) / str(number)))


def _parent(run: TrainConfig) -> str:
    return str(Path(run.output_dir).parent)


def _job(config: LaunchConfig, command: str, site: Site, output_dir: Path) -> SlurmJob:
    run_dir = output_dir.absolute()
    name = config.job_name or f"mswift-{run_dir.name}"
    if config.chain < 1:
        raise ConfigError(f"--chain {config.chain}: a chain has at least one job")
    if config.chain > 1 and config.sweep:
        raise ConfigError("--chain and --sweep: an array's jobs would wait for each other; give one of them")
    if config.sweep_limit is not None and (config.sweep_limit < 1 or not config.sweep):
        raise ConfigError(f"--sweep_limit {config.sweep_limit}: at least 1, and only with --sweep")
    if config.chain > 1:  # one chain is the jobs of one name
        name += f"-{blake3(os.fsencode(run_dir)).hexdigest()[:6]}"
    points = 1
    for item in config.sweep:
        points *= item.count(",") + 1
    return SlurmJob(
        command="pt" if command == "pt" else "sft",
        run_dir=run_dir,
        folder=Path.cwd(),
        name=name,
        nodes=config.nodes,
        nproc_per_node=config.nproc_per_node or site.gpus_per_node or 1,
        site=site,
        ranks=config.ranks,
        time=config.time or site.time,
        signal_seconds=config.signal_seconds,
        requeue=config.requeue,
        preflight=config.preflight,
        singleton=config.chain > 1,
        num_points=points if config.sweep else 0,
        points_at_a_time=config.sweep_limit,
    )
