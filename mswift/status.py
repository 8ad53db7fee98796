"""What a run is doing, from the files of its directory alone: while it writes them, after kill -9, on a login node."""

import fcntl
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from mswift import rank_words, rundir
from mswift.config.status import StatusConfig
from mswift.errors import ConfigError
from mswift.ledger import FINISHED, Goodput, goodput, read_events
from mswift.run_lock import holder_in_words

State = Literal["running", "finished", "stopped", "failed", "killed", "not started"]
_NEWEST = 20
"""Steps over which speed is taken."""
_WORDS, _WIDTH = 4, 300


@dataclass(frozen=True)
class RunStatus:
    """A run as its directory shows it; None where it does not say."""

    output_dir: str
    state: State
    reason: str | None
    """Of a stop: a signal or an error; of a running one: who has the lock."""
    step: int
    last_step: int | None
    metrics: dict[str, Any] | None
    """The newest row of metrics.jsonl."""
    seconds_per_step: float | None
    """Wall time of the newest steps, without evaluation and saving."""
    data_wait: float | None
    """The share of it that was spent waiting for data."""
    seconds_left: float | None
    checkpoint: str | None
    checkpoint_age_seconds: float | None
    starts: int
    repeated_steps: int
    goodput: Goodput
    notes: tuple[str, ...]
    """What somebody should look at."""


def read_status(output_dir: Path, now: float | None = None) -> RunStatus:
    """ConfigError for a directory that holds no run."""
    now = time.time() if now is None else now
    if not any((output_dir / name).exists() for name in (rundir.CONFIG, rundir.METRICS, rundir.LEDGER, rundir.LOCK)):
        raise ConfigError(
            f"{output_dir} holds no run (no {rundir.CONFIG}, no {rundir.METRICS}): name what --output_dir named"
        )
    rows, events = rundir.read_metrics(output_dir), read_events(output_dir)
    holder = _holder(output_dir)
    starts = [event for event in events if event["event"] == "start"]
    last_step = starts[-1].get("last_step") if starts else None
    step = rows[-1]["step"] if rows else (starts[-1]["step"] if starts else 0)
    newest = [row["step_seconds"] for row in rows[-_NEWEST:] if "step_seconds" in row]
    per_step = sum(newest) / len(newest) if newest else None
    state, reason = _state(events, holder)
    path = output_dir / rundir.METRICS
    seen = now if state == "running" else max([path.stat().st_mtime if path.is_file() else 0.0,
                                               events[-1]["time"] if events else 0.0])  # fmt: skip
    steps = rundir.committed_steps(output_dir)
    checkpoint = rundir.checkpoint_dir(output_dir, steps[-1]) if steps else None
    left = None if per_step is None or last_step is None or state != "running" else (last_step - step) * per_step
    broke_off = state in ("failed", "killed") and starts
    notes = (*_notes(output_dir), *(_last_words(output_dir, starts[-1]["time"]) if broke_off else ()))
    return RunStatus(
        str(output_dir), state, reason, step, last_step, rows[-1] if rows else None, per_step,
        rundir.data_wait(rows[-_NEWEST:]), left,
        None if checkpoint is None else str(checkpoint),
        None if checkpoint is None else now - (checkpoint / rundir.COMMIT).stat().st_mtime,
        len(starts), sum(event.get("repeated_steps", 0) for event in starts), goodput(events, rows, seen),
        notes,
    )  # fmt: skip


def _state(events: list[dict[str, Any]], holder: str | None) -> tuple[State, str | None]:
    if holder is not None:
        return "running", holder
    if not events:
        return "not started", None
    last = events[-1]
    if last["event"] != "stop":
        return "killed", "it ended without a word: look at the end of its log, or for a lost node"
    if last["reason"] == FINISHED:
        return "finished", None
    return ("stopped" if last["reason"].startswith("SIG") else "failed"), last["reason"]


def _holder(output_dir: Path) -> str | None:
    """Who has the lock of the directory now; None where nobody has."""
    try:
        with (output_dir / rundir.LOCK).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return holder_in_words(file.read(4096)) or "just started"
            except OSError:
                return None  # a file system without locks
    except OSError:
        pass
    return None


def _notes(output_dir: Path) -> Iterator[str]:
    for path in sorted(output_dir.glob("not-finite-*.jsonl")):
        yield f"{path.name}: the batch of a step whose loss or gradient norm was not finite"
    for path in sorted(output_dir.glob("hang-*")):
        yield f"{path.name}: stacks of ranks that stood still"
    for path in sorted(output_dir.glob("checkpoint-*.not-committed-*")):
        yield f"{path.name}: was moved aside, it has no COMMIT"
    rejected = output_dir / rundir.REJECTED
    if rejected.is_file():
        with rejected.open("rb") as file:
            yield f"{rejected.name}: {sum(1 for _ in file):,} rows of the data were not used"


def _last_words(output_dir: Path, since: float) -> Iterator[str]:
    """What ranks of a start that broke off said last: what few of them said is nearest to the cause."""
    said = rank_words.last_words(output_dir, since)
    for words, ranks in list(said.items())[:_WORDS]:
        yield f"{rank_words.in_words(ranks)} said last: {words[:_WIDTH]}"
    if len(said) > _WORDS:
        yield f"{len(said) - _WORDS} more last words in {output_dir / rank_words.LOGS}"


def main(config: StatusConfig) -> int:
    """Print what `mswift status` knows; exit status 0 for a run that is running or finished, 1 for any other."""
    status = read_status(Path(config.run_dir))
    if config.json:
        print(json.dumps(asdict(status) | {"goodput": _goodput(status.goodput)}))
    else:
        width = 12
        for name, text in _lines(status):
            print(f"{name:{width}}{text}")
    return 0 if status.state in ("running", "finished") else 1


def _goodput(found: Goodput) -> dict[str, float]:
    return asdict(found) | {"share": found.share, "wall_share": found.wall_share}


def _lines(status: RunStatus) -> Iterator[tuple[str, str]]:
    yield "run", status.output_dir
    again = "; the same command continues it" if status.state in ("stopped", "failed", "killed") else ""
    yield "state", status.state + (f" ({status.reason})" if status.reason else "") + again
    of = f" of {status.last_step:,} ({status.step / status.last_step:.1%})" if status.last_step else ""
    yield "step", f"{status.step:,}{of}"
    if row := status.metrics:
        parts = [f"epoch {row['epoch']:.3g}", *(_number(row, name) for name in ("loss", "grad_norm", "lr"))]
        yield "newest", ", ".join(parts + ([_number(row, "eval_loss")] if "eval_loss" in row else []))
        wait = "" if status.data_wait is None else f", {status.data_wait:.1%} of it waiting for data"
        yield "speed", f"{row['tokens_per_second']:,.0f} tokens/s, {status.seconds_per_step or 0:.3g} s a step{wait}"
    if status.seconds_left is not None:
        yield "left", f"{timedelta(seconds=round(status.seconds_left))} without evaluation and saving"
    if status.checkpoint is None:
        yield "checkpoint", "none yet"
    else:
        yield "checkpoint", f"{status.checkpoint}, {timedelta(seconds=round(status.checkpoint_age_seconds or 0))} old"
    if status.starts:
        again = f", {status.repeated_steps:,} steps done again" if status.repeated_steps else ""
        yield "starts", f"{status.starts}{again}"
        good = status.goodput
        parts = [f"{good.share:.1%}: of {good.up:,.1f} s up, {good.steps:,.1f} s were steps that count"]
        parts += [
            f"{good.saves:,.1f} s saving",
            f"{good.repeated:,.1f} s done again",
            f"{good.starting:,.1f} s starting",
        ]
        yield "goodput", ", ".join(parts) + f"; {good.wall_share:.1%} of the {good.wall:,.1f} s since it began"
    for note in status.notes:
        yield "look at", note


def _number(row: dict[str, Any], name: str) -> str:
    return f"{name} not finite" if row[name] is None else f"{name} {row[name]:.4g}"
