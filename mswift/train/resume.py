"""Where a run starts from: `--resume auto|true|false` against what lies in --output_dir. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mswift import rundir
from mswift.errors import ConfigError


@dataclass(frozen=True)
class ResumePoint:
    """The newest committed checkpoint of a run."""

    checkpoint: Path
    step: int


def find_resume_point(output_dir: Path, resume: Literal["auto", "true", "false"]) -> ResumePoint | None:
    """The newest checkpoint, or None: start from --model. ConfigError for what --resume forbids."""
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
