"""What lies in a run directory, and how to read it. No torch: `status` and launchers read runs from login nodes.

output_dir/
    run.yaml                 the resolved configuration of the newest start
    metrics.jsonl            one object a step
    run.jsonl                starts, saves and stops (mswift.ledger)
    rejected.jsonl           rows of the data that could not be used, and why; absent if there are none
    loss.png                 the loss curve, drawn at the end
    runs/                    TensorBoard events
    checkpoint-<step>/       complete, hashed, committed; anything else is not a checkpoint
    .checkpoint-<step>.partial/   a save under way, or the remains of one that was killed, or of one being removed
    hf-<step>/               the model of that step as Hugging Face files (--save_hf_steps)
    not-finite-<step>.jsonl  the batch of a step whose loss or gradient norm was not finite
    hang-<start>/            stacks of a run that stood still
    logs/<start>/            what ranks other than 0 said (mswift.rank_words)
    launch/                  of `mswift launch slurm`: recipe, script, jobs, starts, end, logs
    .lock                    held by the run that writes here (mswift.run_lock)
"""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from mswift.errors import CheckpointError

METRICS = "metrics.jsonl"
LEDGER = "run.jsonl"
CONFIG = "run.yaml"
REJECTED = "rejected.jsonl"
LOSS_PLOT = "loss.png"
TENSORBOARD = "runs"
COMMIT = "COMMIT"
STATE = "run.json"
HF_FILES = "hf"
LOCK = ".lock"
LAUNCH = "launch"
JOBS = "jobs.json"
_COMMIT_VERSION = 2
_HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and BLAKE3 (hex) of one file of a checkpoint."""

    size_bytes: int
    blake3: str


def checkpoint_dir(output_dir: Path, step: int) -> Path:
    """The place of the committed checkpoint of `step`."""
    return output_dir / f"checkpoint-{step}"


def partial_dir(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` grows until it is renamed."""
    return output_dir / f".checkpoint-{step}.partial"


def snapshot_dir(output_dir: Path, step: int) -> Path:
    """The place of the Hugging Face files of `step`."""
    return output_dir / f"hf-{step}"


def partial_snapshot_dir(output_dir: Path, step: int) -> Path:
    """Where they grow until they are renamed."""
    return output_dir / f".hf-{step}.partial"


def committed_steps(output_dir: Path) -> list[int]:
    """Steps of all committed checkpoints, ascending; derived from the directories, never from a pointer file."""
    if not output_dir.is_dir():
        return []
    steps = []
    for entry in output_dir.iterdir():
        prefix, _, number = entry.name.rpartition("-")
        if prefix == "checkpoint" and number.isdecimal() and (entry / COMMIT).is_file():
            steps.append(int(number))
    return sorted(steps)


def resolve_checkpoint(path: Path) -> Path:
    """`path` itself if it is a committed checkpoint, else the newest one of the run directory `path`."""
    if (path / COMMIT).is_file():
        return path
    steps = committed_steps(path)
    if not steps:
        raise CheckpointError(
            f"{path} is neither a committed checkpoint (a directory with {COMMIT}) nor a run directory "
            f"that holds one (checkpoint-N/{COMMIT}); a run saves its first at --save_steps or at its end"
        )
    return checkpoint_dir(path, steps[-1])


def hash_file(path: Path) -> FileRecord:
    """Size and BLAKE3 of a file, read in blocks of 1 MiB."""
    digest = blake3()
    size_bytes = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            size_bytes += len(block)
    return FileRecord(size_bytes, digest.hexdigest())


def fsync_path(path: Path) -> None:
    """Force a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all: temporary file, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def append_object(path: Path, value: Mapping[str, Any]) -> None:
    """One more line of JSON; on a line of its own also after one that a kill or a full disk left torn."""
    line = json.dumps(value) + "\n"
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The objects of lines of JSON; torn lines are left out, a missing file has none."""
    objects = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects


def commit(directory: Path, destination: Path, files: Mapping[str, FileRecord]) -> None:
    """Publish `directory` as `destination`: write COMMIT last, fsync, rename; the rename is the publication.

    What lies at `destination` without COMMIT is no checkpoint of ours: it is moved aside, not deleted.
    """
    if destination.exists() and not (destination / COMMIT).exists():
        destination.rename(destination.with_name(f"{destination.name}.not-committed-{time.time_ns()}"))
    write_commit(directory, files)
    directory.rename(destination)
    fsync_path(destination.parent)


def write_commit(directory: Path, files: Mapping[str, FileRecord]) -> None:
    """COMMIT of a directory that is published under another name afterwards."""
    records = {n: {"size": r.size_bytes, "blake3": r.blake3} for n, r in sorted(files.items())}
    write_json(directory / COMMIT, {"version": _COMMIT_VERSION, "files": records})
    fsync_path(directory)


def await_commit(checkpoint: Path, seconds: float) -> None:
    """Return when this machine sees the checkpoint that another one has committed; CheckpointError after `seconds`.

    Clients of a network file system may not see a new directory for as long as they cache the old listing.
    """
    end = time.monotonic() + seconds
    while not (checkpoint / COMMIT).is_file() and time.monotonic() < end:
        time.sleep(0.2)
        os.listdir(checkpoint.parent)  # asks the server again
    read_commit(checkpoint)


def read_commit(checkpoint: Path) -> dict[str, FileRecord]:
    """The files that a committed checkpoint consists of."""
    path = checkpoint / COMMIT
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["version"] != _COMMIT_VERSION:
            raise CheckpointError(f"{path}: version {value['version']}; this mswift reads {_COMMIT_VERSION}")
        return {n: FileRecord(int(r["size"]), str(r["blake3"])) for n, r in value["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} is not a committed checkpoint: it has no {COMMIT}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use an older checkpoint of the run") from None


def check_files(checkpoint: Path, names: Iterable[str] | None = None, *, hashes: bool = True) -> None:
    """Compare sizes and hashes with COMMIT (all files, or `names`); the first difference is an error naming it."""
    records = read_commit(checkpoint)
    for name in records if names is None else names:
        path = checkpoint / name
        want = records[name]
        if not path.is_file():
            raise CheckpointError(f"{path} is missing (COMMIT lists it with {want.size_bytes} bytes)")
        found = path.stat().st_size
        if found != want.size_bytes:
            raise CheckpointError(f"{path} is damaged: {found} bytes, COMMIT says {want.size_bytes}")
        if hashes and (digest := hash_file(path).blake3) != want.blake3:
            raise CheckpointError(f"{path} is damaged: BLAKE3 {digest[:16]}..., COMMIT says {want.blake3[:16]}...")


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl; a torn last line (a killed writer) is left out. CheckpointError for other lines."""
    path = output_dir / METRICS
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                continue
            row = None
        if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
            raise CheckpointError(
                f"{path}, line {number}: not a JSON object with a step; remove that line, or move the file away "
                "(a run needs only its checkpoints to continue)"
            )
        rows.append(row)
    return rows


def data_wait(rows: Sequence[dict[str, Any]]) -> float | None:
    """Of the time of these steps (rows of metrics.jsonl), the share spent waiting for data; None: no row tells it."""
    told = [(row["step_seconds"], row["data_wait"]) for row in rows if "data_wait" in row]
    total = sum(seconds for seconds, _ in told)
    return sum(seconds * share for seconds, share in told) / total if total > 0 else None


def truncate_metrics(output_dir: Path, step: int) -> list[dict[str, Any]]:
    """Drop what was logged after `step`, so that a resumed run continues the same file; the dropped rows."""
    path = output_dir / METRICS
    if not path.is_file():
        return []
    found = read_metrics(output_dir)
    rows = [row for row in found if row["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)
    return [row for row in found if row["step"] > step]
