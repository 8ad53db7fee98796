"""Where a run starts from: `--resume auto|true|false` against what lies in --output_dir. No torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mswift import rundir
from mswift.config.train import TrainConfig
from mswift.errors import ConfigError
from mswift.tuners.export import is_adapter_checkpoint

_OF_A_MODEL = ("config.json", ".metadata", "adapter_config.json", rundir.COMMIT)


@dataclass(frozen=True)
class ResumePoint:
    """The newest committed checkpoint of a run."""

    checkpoint: Path
    step: int


def find_resume_point(output_dir: Path, resume: Literal["auto", "true", "false"]) -> ResumePoint | None:
    """The newest checkpoint, or None: start from --model. ConfigError for what --resume forbids."""
    _check_output_dir(output_dir)
    steps = rundir.committed_steps(output_dir)
    if steps:
        if resume == "false":
            raise ConfigError(
                f"--resume false: {output_dir} holds checkpoint-{steps[-1]}; pass --resume auto to continue it, or "
                "another --output_dir"
            )
        return ResumePoint(rundir.checkpoint_dir(output_dir, steps[-1]), steps[-1])
    if resume == "true":
        raise ConfigError(
            f"--resume true: no committed checkpoint in --output_dir {output_dir}; pass --resume auto to start there"
        )
    return None


def start_of(config: TrainConfig) -> tuple[Path, ResumePoint | None]:
    """The directory whose weights a launch reads, and what it continues; ConfigError where it would not start.

    A run of full weights continues with its own; an adapter's base is always --model.
    """
    resume = find_resume_point(Path(config.output_dir), config.resume)
    if resume is None or config.tuner_type != "full":
        return Path(config.model), resume
    if is_adapter_checkpoint(resume.checkpoint):
        raise ConfigError(
            f"--tuner_type full: the run of --output_dir {config.output_dir} trains an adapter; pass --tuner_type "
            "lora, or start a new run with another --output_dir"
        )
    return resume.checkpoint, resume


def _check_output_dir(output_dir: Path) -> None:
    """ConfigError for what cannot become a run directory, and for the directory of a model: it must stay as it is."""
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"--output_dir {output_dir}: {there} is a file; name a directory: --output_dir {there}-run")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir {output_dir}: {there} cannot be written to; name another: --output_dir run")
    for name in _OF_A_MODEL:
        if (output_dir / name).exists():
            raise ConfigError(
                f"--output_dir {output_dir} holds {name}, so it is a model or a checkpoint; name a directory of its "
                f"own: --output_dir {output_dir}-run"
            )
