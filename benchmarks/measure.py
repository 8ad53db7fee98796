"""What the benchmarks share: the machine's name and a process's memory, as Linux tells them, and rows of chats."""

import json
import os
import platform
import random
from collections.abc import Iterator, Sequence
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


def conversations(chosen: random.Random, words: Sequence[str]) -> Iterator[str]:
    """Lines of a chat set without end: one to three turns, each 5 to 240 words that stand together in `words`."""
    while True:
        messages = []
        for role in ("user", "assistant") * chosen.randint(1, 3):
            start, count = chosen.randrange(len(words)), chosen.randint(5, 240)
            messages.append({"role": role, "content": " ".join(words[start : start + count])})
        yield json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
