"""Commands as processes: timed, sampled for memory, killed from outside after so many written bytes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Samples:
    """Seconds and CPU seconds of each round; largest memory of the command with all its children."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def command(source: Path, destination: Path, to: str, *flags: str) -> list[str]:
    """The command line of a conversion."""
    program = [sys.executable, "-m", "mswift.cli.main", "convert", "--model", str(source), "--to", to]
    return [*program, "--output_dir", str(destination), *flags]


def measure(argv: Sequence[str], samples: Samples, *, memory: bool = False) -> None:
    """Runs a command and adds what it took; `memory`: the sum of PSS of its processes, every 10 ms (it costs time)."""
    start = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    while memory and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        samples.peak_bytes = max(samples.peak_bytes, sum(map(pss_bytes, descendants(process.pid))))
        time.sleep(0.01)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    samples.seconds.append(time.perf_counter() - start)
    samples.cpu_seconds.append(usage.ru_utime + usage.ru_stime)
    if status:
        raise SystemExit(f"failed with status {process.returncode}: {' '.join(argv)}")


def descendants(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:  # it ended
                continue
    return found


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process; 0 if it has ended."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def written_bytes(pid: int) -> int:
    """Bytes that a process, running or ended but not yet waited for, has given to the system to write."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    raise OSError(f"/proc/{pid}/io has no wchar")


def run_until(argv: Sequence[str], limit: int | None) -> tuple[bool, int]:
    """Runs a command, kill -9 once it has written `limit` bytes; (was it killed, bytes it wrote)."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while limit is not None:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        if written_bytes(process.pid) >= limit:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    written = written_bytes(process.pid)
    _, error = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(f"status {process.returncode}: {error}")
    return process.returncode != 0, written
