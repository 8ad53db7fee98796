"""A file of gigabytes: the peak of the processes that make its token cache, and the start of the next run on it."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.conversion.processes import descendants
from benchmarks.measure import conversations


def write_large(path: Path, size: int, words: Sequence[str]) -> int:
    """Rows of a chat set until there are so many bytes; their number."""
    chosen, rows = random.Random(0), 0
    with path.open("w", encoding="utf-8") as stream:
        for line in conversations(chosen, words):
            stream.write(line)
            rows += 1
            if stream.tell() >= size:
                return rows
    return rows


def build(path: Path, model: Path, cache: Path, num_proc: int) -> tuple[str, float, float, int, int]:
    """`mswift data build`: (what it printed, seconds, CPU seconds, bytes, processes).

    Bytes: the resident peaks of the process and its children, each its own (VmHWM), added up: at least what they held
    at any one time.
    """
    argv = [sys.executable, "-m", "mswift.cli.main", "data", "build", "--model", str(model), "--dataset", str(path),
            "--max_length", "4096", "--dataset_num_proc", str(num_proc), "--cache_dir", str(cache)]  # fmt: skip
    peaks: dict[int, int] = {}
    before, started = os.times(), time.perf_counter()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peaks |= dict(_peaks(process.pid))
            time.sleep(0.05)
        assert process.stdout is not None
        said = process.stdout.read()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)}: exit status {process.returncode}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return said, seconds, cpu, sum(peaks.values()), len(peaks)


def _peaks(pid: int) -> Iterator[tuple[int, int]]:
    for each in descendants(pid):
        try:
            lines = Path(f"/proc/{each}/status").read_text().splitlines()
        except OSError:  # it ended
            continue
        yield from ((each, int(line.split()[1]) * 1024) for line in lines if line.startswith("VmHWM:"))


def large(folder: Path, model: Path, words: Sequence[str], megabytes: int, num_proc: int) -> list[str]:
    path, cache = folder / "large.jsonl", folder / "cache"
    rows = write_large(path, megabytes << 20, words)
    said, seconds, cpu, peak, processes = build(path, model, cache, num_proc)
    again = [build(path, model, cache, num_proc) for _ in range(3)]
    inside = sorted(_opened(path, model, cache) for _ in range(3))[1]
    last = said.strip().splitlines()[-1]
    fastest = min(again, key=lambda one: one[1])
    return [
        f"a `.jsonl` of {path.stat().st_size:,} bytes, {rows:,} conversations; {num_proc} tokenising processes",
        "",
        f"{last}",
        "",
        "| `mswift data build` | seconds | CPU seconds | peak of all processes | processes |",
        "|---|---|---|---|---|",
        f"| first | {seconds:,.0f} | {cpu:,.0f} | {peak / 2**20:,.0f} MiB | {processes} |",
        f"| again (least of 3), Python's start and imports in it | {fastest[1]:.2f} | {fastest[2]:.2f} "
        f"| {fastest[3] / 2**20:,.0f} MiB | {fastest[4]} |",
        f"| of it the data set (median of 3) | {inside[0]:.3f} | {inside[1]:.3f} | | |",
    ]


def _opened(path: Path, model: Path, cache: Path) -> tuple[float, float]:
    """(seconds, CPU seconds) until a run has its data set, tokenizer loaded."""
    from mswift.data.dataset import DataOptions, build_dataset
    from mswift.data.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(model)
    options = DataOptions(max_length=4096, cache_dir=cache)
    started, cpu = time.perf_counter(), time.process_time()
    data = build_dataset("sft", [str(path)], tokenizer, options, is_writer=True, barrier=lambda: None, progress=False)
    data.sample(len(data) - 1)
    return time.perf_counter() - started, time.process_time() - cpu
