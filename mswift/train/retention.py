"""Which checkpoints of a run stay, and what becomes of damaged ones and of remains. No torch."""

import shutil
import time
from pathlib import Path

from mswift import rundir
from mswift.errors import CheckpointError


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of COMMIT is there with its size."""
    try:
        rundir.check_files(checkpoint, hashes=False)
    except CheckpointError:
        return False
    return True


def prune(output_dir: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` (at least 1) committed checkpoints; returns what was deleted.

    One that is not whole counts for nothing: as long as it is there, a whole one more stays. Each is renamed first, so
    that a deletion cut short leaves nothing that looks like a checkpoint or is in its place.
    """
    steps = rundir.committed_steps(output_dir)
    whole = [step for step in steps if is_whole(rundir.checkpoint_dir(output_dir, step))][-max(keep, 1) :]
    gone = [step for step in steps if whole and step < whole[0]]
    for step in gone:
        remains = rundir.partial_dir(output_dir, step)
        shutil.rmtree(remains, ignore_errors=True)
        rundir.checkpoint_dir(output_dir, step).rename(remains)
        rundir.fsync_path(output_dir)
        shutil.rmtree(remains)
    return [rundir.checkpoint_dir(output_dir, step) for step in gone]


def set_aside(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name that is no checkpoint's; its files stay for inspection."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged-{time.time_ns()}")
    checkpoint.rename(aside)
    rundir.fsync_path(checkpoint.parent)
    return aside


def remove_remains(output_dir: Path) -> None:
    """Delete what killed saves and removals left behind; for the run that holds the lock."""
    for pattern in (".checkpoint-*.partial", ".hf-*.partial"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
