"""What the benchmarks share: the machine's name and a process's memory, as Linux tells them, tables, rows of chats."""

import json
import os
import platform
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


def cpu_name() -> str:
    """Model name and number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def resident_bytes() -> int:
    """Resident memory now; its high-water mark starts anew from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_bytes() -> int:
    """Largest resident memory since `resident_bytes`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def training_table(
    steps: Mapping[str, Sequence[tuple[float, float, int]]], tokens: int, memory: str = "memory"
) -> list[str]:
    """Lines of a table of contenders against "mswift".

    steps: (wall seconds, CPU seconds, peak bytes until then) of each step; tokens: of a step.
    """
    medians = {
        name: [statistics.median(column) for column in list(zip(*taken, strict=True))[:2]]
        for name, taken in steps.items()
    }
    lines = [
        "| contender | tokens/s (median) | least | most | mswift / it | CPU seconds per step (median) | mswift / it "
        f"| {memory} | it / mswift |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, taken in steps.items():
        rates = sorted(tokens / wall for wall, *_ in taken)
        wall, cpu = medians[name]
        held, ours = taken[-1][2], steps["mswift"][-1][2]
        lines.append(
            f"| {name} | {statistics.median(rates):.0f} | {rates[0]:.0f} | {rates[-1]:.0f} "
            f"| {wall / medians['mswift'][0]:.2f} | {cpu:.3f} | {cpu / medians['mswift'][1]:.2f} "
            f"| {held / 2**20:.0f} MiB | {held / ours:.2f} |"
        )
    return lines


def publish(text: str, path: Path | None) -> None:
    """Print a report; behind what a file holds, where one is named."""
    print(text)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write("\n" + text)


def conversations(chosen: random.Random, words: Sequence[str]) -> Iterator[str]:
    """Lines of a chat set without end: one to three turns, each 5 to 240 words that stand together in `words`."""
    while True:
        messages = []
        for role in ("user", "assistant") * chosen.randint(1, 3):
            start, count = chosen.randrange(len(words)), chosen.randint(5, 240)
            messages.append({"role": role, "content": " ".join(words[start : start + count])})
        yield json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
