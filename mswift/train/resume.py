"""Where a run starts from: what lies in --output_dir, or the checkpoint of another run, or --model. No torch."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mswift import rundir
from mswift.config.loader import to_plain
from mswift.config.train import TrainConfig
from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.export import is_adapter_checkpoint, tuner_of

_OF_THE_MODEL = ("rope_scaling", "max_model_len", "new_special_tokens")
"""Flags that change a model before it is trained."""
_OF_A_MODEL = ("config.json", ".metadata", "adapter_config.json", rundir.COMMIT)


@dataclass(frozen=True)
class ResumePoint:
    """A committed checkpoint to start from. weights_only: its weights alone; `step` is 0 then."""

    checkpoint: Path
    step: int
    weights_only: bool = False


def starting_point(config: TrainConfig) -> ResumePoint | None:
    """The newest checkpoint of --output_dir, else --resume_from_checkpoint, else None: start from --model.

    An --output_dir with checkpoints of its own is continued whatever the other flags say, so that the command which
    started a run continues it. ConfigError for what --resume forbids.
    """
    output_dir, elsewhere = Path(config.output_dir), config.resume_from_checkpoint
    skip_damaged = config.damaged_checkpoint == "previous"
    if elsewhere is None:
        return find_resume_point(output_dir, config.resume, skip_damaged=skip_damaged)
    other = _other_checkpoint(Path(elsewhere), output_dir)
    own = find_resume_point(output_dir, "auto" if config.resume == "true" else config.resume, skip_damaged=skip_damaged)
    if own is not None:
        return own
    return ResumePoint(other, 0 if config.load_weights_only else _step_of(other), config.load_weights_only)


def find_resume_point(
    output_dir: Path, resume: Literal["auto", "true", "false"], *, skip_damaged: bool = False
) -> ResumePoint | None:
    """The newest checkpoint, or None: start from --model. ConfigError for what --resume forbids.

    skip_damaged: not one whose damage shows without reading its tensors, but the newest before it.
    """
    _check_output_dir(output_dir)
    steps = rundir.committed_steps(output_dir)
    if steps:
        if resume == "false":
            raise ConfigError(
                f"--resume false: {output_dir} holds checkpoint-{steps[-1]}; pass --resume auto to continue it, or "
                "another --output_dir"
            )
        if skip_damaged:
            steps = [step for step in steps if not _is_plainly_damaged(rundir.checkpoint_dir(output_dir, step))]
            if not steps:
                raise CheckpointError(
                    f"--damaged_checkpoint previous: every checkpoint in --output_dir {output_dir} is damaged; move "
                    "them away to start from --model"
                )
        return ResumePoint(rundir.checkpoint_dir(output_dir, steps[-1]), steps[-1])
    if resume == "true":
        raise ConfigError(
            f"--resume true: no committed checkpoint in --output_dir {output_dir}; pass --resume auto to start there"
        )
    return None


def start_of(config: TrainConfig) -> tuple[Path, ResumePoint | None]:
    """The directory whose weights a launch reads, and what it starts from; ConfigError where it would not start.

    A run of full weights takes them from its checkpoint; an adapter's base is always --model.
    """
    point = starting_point(config)
    if point is None:
        return Path(config.model), None
    adapter = is_adapter_checkpoint(point.checkpoint)
    if not config.trains_adapter and adapter:
        raise ConfigError(
            f"--tuner_type {config.tuner_type}: the run of {point.checkpoint} trains an adapter; pass --tuner_type "
            f"{tuner_of(point.checkpoint)}, or start a new run with another --output_dir"
        )
    if config.trains_adapter and not adapter:
        raise ConfigError(
            f"--tuner_type {config.tuner_type}: {point.checkpoint} holds a whole model; pass --tuner_type full, or "
            f"start a new run with another --output_dir (and --model {point.checkpoint})"
        )
    if point.weights_only and not config.trains_adapter:
        _check_as_it_is(config, point.checkpoint)
    return Path(config.model) if config.trains_adapter else point.checkpoint, point


def _check_as_it_is(config: TrainConfig, checkpoint: Path) -> None:
    """ConfigError for flags that ask for another model than the one whose weights are taken."""
    then = _run_of(checkpoint).get("config", {})
    for name in _OF_THE_MODEL:
        default = TrainConfig.__dataclass_fields__[name].default
        now = to_plain(getattr(config, name))
        if getattr(config, name) != default and then.get(name) != now:
            given, there = (" ".join(v) if isinstance(v, list) else v for v in (now, then.get(name)))
            raise ConfigError(
                f"--{name} {given}: --load_weights_only takes the model of {checkpoint} as it is, whose run had "
                f"{there or 'none'}: leave it out, or give --model {checkpoint} in place of --resume_from_checkpoint "
                "and --load_weights_only"
            )


def _is_plainly_damaged(checkpoint: Path) -> bool:
    """Whether a file is missing or has another size, or a small one (not a shard) other bytes than COMMIT says."""
    try:
        rundir.check_files(checkpoint, hashes=False)
        rundir.check_files(checkpoint, [name for name in rundir.read_commit(checkpoint) if not is_shard(name)])
    except CheckpointError:
        return True
    return False


def is_shard(name: str) -> bool:
    """Whether a file of a checkpoint holds tensors."""
    return name.endswith(".distcp")


def _other_checkpoint(path: Path, output_dir: Path) -> Path:
    """The checkpoint that --resume_from_checkpoint means."""
    flag = f"--resume_from_checkpoint {path}"
    if path.resolve() == output_dir.resolve() or output_dir.resolve() in path.resolve().parents:
        raise ConfigError(
            f"{flag} lies in --output_dir {output_dir}, whose newest checkpoint is continued anyway: leave it out; to "
            "go on from an older one, move the newer ones away; for a new run give another --output_dir"
        )
    try:
        return rundir.resolve_checkpoint(path)
    except CheckpointError as error:
        raise ConfigError(f"--resume_from_checkpoint: {error}") from None


def _step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was saved after, whatever its directory is called."""
    try:
        return int(_run_of(checkpoint)["step"])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / rundir.STATE} cannot be read ({error})") from None


def _run_of(checkpoint: Path) -> dict[str, Any]:
    """What run.json says."""
    try:
        found = json.loads((checkpoint / rundir.STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / rundir.STATE} cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{checkpoint / rundir.STATE} cannot be read (no object)")
    return found


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
