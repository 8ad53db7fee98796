"""Entering the run directory: one run at a time, all ranks from the same checkpoint, and from a sound one."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mswift import rundir
from mswift.converters.io.files import NO_SPACE
from mswift.errors import CheckpointError, ConfigError
from mswift.run_lock import locked
from mswift.train.checkpoint import check_share
from mswift.train.collective import agreed, gather_objects
from mswift.train.resume import ResumePoint, starting_point
from mswift.train.retention import remove_remains, set_aside
from mswift.train.run import Start, prepare

_OWN_PAST_SECONDS = 30.0  # for which ranks that hang go on after they have noticed
_GONE_SECONDS = 120.0  # network file systems cache a listing for up to a minute


def enter_run_directory(start: Start, stack: ExitStack) -> Start:
    """Lock --output_dir until the end, on rank 0; prove the checkpoint that all ranks start from.

    Returns the start that holds then: --damaged_checkpoint previous may lead to an older checkpoint.
    """
    output_dir = Path(start.config.output_dir)
    with agreed(f"opening {output_dir}"):
        if start.info.rank == 0:
            own_past = start.config.distributed_timeout_minutes * 60 + _OWN_PAST_SECONDS
            with _writable(output_dir):
                stack.enter_context(locked(output_dir, own_past))
                remove_remains(output_dir)
            if starting_point(start.config) != start.point:
                raise ConfigError(f"--output_dir {output_dir}: another run has just saved there; start again")
    _check_same_point(start)
    while (fault := _fault(start)) is not None:
        start = _after_damage(start, fault)
    _set_aside_newer(start)
    return start


@contextmanager
def _writable(output_dir: Path) -> Iterator[None]:
    """What the machine says against a directory to write to, as ConfigError; a full disk is told by the caller."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise ConfigError(
            f"--output_dir {output_dir} cannot be written ({error.strerror}): name a directory that can be"
        ) from error


def _check_same_point(start: Start) -> None:
    """ConfigError where a rank sees another newest checkpoint than rank 0."""
    steps = gather_objects(start.point.step if start.point else None)
    for rank, step in enumerate(steps):
        if step != steps[0]:
            seen = [f"checkpoint-{s}" if s is not None else "no checkpoint" for s in (step, steps[0])]
            raise ConfigError(
                f"--output_dir {start.config.output_dir}: rank {rank} sees {seen[0]} there, rank 0 {seen[1]}: use an "
                "--output_dir on a file system that all nodes share (if it is, start again in a minute: its caches "
                "are behind)"
            )


def _fault(start: Start) -> str | None:
    """What is wrong with the files to start from, the same text on all ranks; each rank reads a share of them.

    They are a checkpoint that is continued, or the one of another run that --model names.
    """
    model = start.reader.hf_files.parent
    checkpoints = [start.point.checkpoint] if start.point else []
    if start.reader.hf_files.name == rundir.HF_FILES and (model / rundir.COMMIT).is_file():
        checkpoints += [model] if model not in checkpoints else []
    fault = None
    for checkpoint in checkpoints:
        try:
            check_share(checkpoint, start.info.rank, start.info.world_size)
        except CheckpointError as error:
            fault = fault or str(error)
        except OSError as error:
            fault = fault or f"{checkpoint} cannot be read ({error.strerror}: {error.filename})"
    return next((text for text in gather_objects(fault) if text is not None), None)


def _after_damage(start: Start, fault: str) -> Start:
    """Start again from the checkpoint before a damaged one of this run, if that was asked for; else CheckpointError."""
    output_dir, point = Path(start.config.output_dir), start.point
    if point is None or not _is_own(point, output_dir) or str(point.checkpoint) not in fault:
        raise CheckpointError(fault)
    older = [step for step in rundir.committed_steps(output_dir) if step < point.step]
    if start.config.damaged_checkpoint == "stop":
        where = f"checkpoint-{older[-1]}" if older else "the start"
        asked = "--damaged_checkpoint previous, or " if older else ""
        raise CheckpointError(f"{fault}; to go on from {where}: {asked}move {point.checkpoint} away")
    if not older:
        raise CheckpointError(f"{fault}; there is none before it: move it away to start from --model")
    with agreed(f"setting {point.checkpoint} aside"):
        if start.info.rank == 0:
            _say_aside(point.checkpoint, fault)
    with agreed(f"setting {point.checkpoint} aside"):
        end = time.monotonic() + _GONE_SECONDS
        while point.checkpoint.exists() and time.monotonic() < end:
            time.sleep(0.2)
        again = prepare(start.kind, start.config, start.info)
    _check_same_point(again)
    return again


def _set_aside_newer(start: Start) -> None:
    """Checkpoints after the one that is continued are those that --damaged_checkpoint previous passed over."""
    output_dir, point = Path(start.config.output_dir), start.point
    with agreed(f"opening {output_dir}"):
        if start.info.rank == 0 and point is not None and _is_own(point, output_dir):
            for step in rundir.committed_steps(output_dir):
                if step > point.step:
                    checkpoint = rundir.checkpoint_dir(output_dir, step)
                    _say_aside(checkpoint, f"{checkpoint} is damaged")


def _say_aside(checkpoint: Path, fault: str) -> None:
    print(f"{fault}: set aside as {set_aside(checkpoint).name} (--damaged_checkpoint previous)", flush=True)


def _is_own(point: ResumePoint, output_dir: Path) -> bool:
    return point.checkpoint.parent == output_dir
