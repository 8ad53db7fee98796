"""What the ranks of a run said last, for all of them at once: from their files, or from a log that srun labelled.

output_dir/logs/<start>/rank-00003.err     of ranks that torchrun started (rank 0 writes to the console)
output_dir/launch/log-<job>.txt            "3: words" of rank 3, where each rank is a task of srun
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mswift import rundir

LOGS = "logs"
_BYTES = 64 << 10
_LOG_BYTES = 8 << 20
_VERDICT = re.compile(rb"^mswift launch: .*$", re.MULTILINE)
_LABELLED = re.compile(rb"^ *(\d+): (.*)$", re.MULTILINE)


def path_of(folder: Path, rank: int) -> Path:
    """Where a rank's stderr goes; its stdout beside it, as .out."""
    return folder / f"rank-{rank:05d}.err"


def in_words(ranks: Sequence[int]) -> str:
    """Ascending ranks as "rank 3" or "ranks 3, 5-7"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = ", ".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs)
    return f"rank{'s' * (len(ranks) > 1)} {words}"


def by_last_line(said: Mapping[int, bytes]) -> dict[str, list[int]]:
    """Last line that is not blank -> the ranks whose it is, ascending; the rarest first. Silent ranks are left out."""
    found: dict[str, list[int]] = {}
    for rank, content in sorted(said.items()):
        if text := content.decode(errors="replace").strip():
            found.setdefault(text.splitlines()[-1], []).append(rank)
    return dict(sorted(found.items(), key=lambda entry: len(entry[1])))


def last_words(output_dir: Path, since: float) -> dict[str, list[int]]:
    """`by_last_line` of the start that began at `since`; {} where its ranks have no files and no labelled log."""
    folders = sorted((output_dir / LOGS).glob("*/"), key=lambda path: path.stat().st_mtime)
    files = [path for path in folders[-1].glob("rank-*.err") if path.stat().st_mtime >= since] if folders else []
    logs = sorted((output_dir / rundir.LAUNCH).glob("log-*.txt"), key=lambda path: path.stat().st_mtime)
    if files or not logs:
        return by_last_line({int(path.stem[5:]): _end(path, _BYTES) for path in files})
    for start in reversed(_VERDICT.split(_end(logs[-1], _LOG_BYTES))[-2:]):  # the last may be what follows its verdict
        if said := _LABELLED.findall(start):
            return by_last_line({int(rank): words for rank, words in said if words.strip()})
    return {}


def _end(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read(size)
