"""Conversions as processes that are killed after so many written bytes, from outside: no hook in the code."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def command(source: Path, destination: Path, to: str, *flags: str) -> list[str]:
    """The command line of a conversion."""
    program = [sys.executable, "-m", "mswift.cli.main", "convert", "--model", str(source), "--to", to]
    return [*program, "--output_dir", str(destination), *flags]


def written_bytes(pid: int) -> int:
    """Bytes that a process, running or ended but not yet waited for, has given to the system to write."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    raise OSError(f"/proc/{pid}/io has no wchar")


def run_until(argv: Sequence[str], limit: int | None) -> tuple[bool, int]:
    """Runs a command, kill -9 once it has written `limit` bytes; (was it killed, bytes it wrote)."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while limit is not None and process.returncode is None:
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
