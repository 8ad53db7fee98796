"""Runs programs that a model wrote, each in a process of its own that can do nothing but compute. Torch-free.

strict: Landlock leaves it an empty directory and the standard library to read; seccomp takes the network, new
processes, signals to others and everything about the machine; limits hold CPU, memory, files and processes.
limits: only the limits, the empty directory and the process group, for machines that cannot do more.
Either way a process group is killed as a whole when its time is up.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mswift.errors import ConfigError

Mode = Literal["strict", "limits"]
_CHILD = Path(__file__).with_name("confine.py")
_NUM_RESULT_BYTES = 4096


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    """Longer than the CPU time: a busy machine is no fault of the program."""
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    num_files: int = 32
    num_processes: int = 1


@dataclass(frozen=True)
class Verdict:
    """Whether the program ran to its end, and if not, why."""

    passed: bool
    reason: str = ""


def check(mode: Mode) -> None:
    """ConfigError where this machine cannot confine a program in this mode."""
    run("pass", mode)


def run_all(
    programs: Sequence[str], mode: Mode, num_processes: int | None = None, limits: Limits | None = None
) -> list[Verdict]:
    """Run programs, `num_processes` (default: one a core) side by side; verdicts in their order."""
    with ThreadPoolExecutor(num_processes or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda program: run(program, mode, limits), programs))


def run(program: str, mode: Mode, limits: Limits | None = None) -> Verdict:
    """Run a program to its end: passed where nothing was raised. ConfigError where it could not be confined."""
    limits, token = limits or Limits(), secrets.token_hex(16)
    job = {
        "program": program,
        "token": token,
        "strict": mode == "strict",
        "readable": _readable(),
        "limits": {name: value for name, value in asdict(limits).items() if name != "wall_seconds"},
    }
    with tempfile.TemporaryDirectory(prefix="mswift-sandbox-") as directory:
        lines, status, late = _run(json.dumps(job).encode(), Path(directory), limits.wall_seconds)
    if not lines or lines[0] != "confined":
        if lines and lines[0].startswith("cannot "):
            raise ConfigError(
                f"programs that a model wrote cannot be confined here: {lines[0].removeprefix('cannot ')}; run them on "
                "Linux 5.13 or newer with Landlock and seccomp (x86-64 or arm64), or give --sandbox limits, which "
                "only limits time, memory and processes: files and the network stay open to them"
            )
        if not late:
            raise ConfigError(f"the process that confines programs ended with {status} before it ran one: {lines}")
        return Verdict(False, "no time left before it began")
    if lines[-1] == f"passed {token}":
        return Verdict(True)
    if lines[-1].startswith("failed "):
        return Verdict(False, lines[-1].removeprefix("failed "))
    if late:
        return Verdict(False, f"still running after {limits.wall_seconds:g} s")
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return Verdict(False, f"killed: it used up its {limits.cpu_seconds} s of CPU time, or the machine's memory")
    return Verdict(False, f"ended by itself with status {status}, its tests not done")


def _run(job: bytes, directory: Path, wall_seconds: float) -> tuple[list[str], int, bool]:
    """What the child said, its exit status, and whether it was stopped for its time."""
    reader, writer = os.pipe()
    command = [sys.executable, "-P", "-S", "-B", str(_CHILD), str(writer)]
    with open(reader, "rb") as answers:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=directory,
                env={"PYTHONHASHSEED": "0"},
                pass_fds=(writer,),
                start_new_session=True,
            )
        finally:
            os.close(writer)
        late = threading.Event()

        def stop() -> None:
            late.set()
            _kill_group(child)

        timer = threading.Timer(wall_seconds, stop)
        timer.start()
        try:
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(job)
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            status = _wait_unreaped(child)
        finally:
            timer.cancel()
            _kill_group(child)  # what it left behind
            child.wait()
        os.set_blocking(reader, False)  # somebody who left the group may still hold the other end
        said = answers.read(_NUM_RESULT_BYTES) or b""
    return said.decode(errors="replace").splitlines(), status, late.is_set()


def _wait_unreaped(child: "subprocess.Popen[bytes]") -> int:
    """The exit status, of a child that is still there: its group's number is nobody else's until it is killed."""
    result = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert result is not None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def _kill_group(child: "subprocess.Popen[bytes]") -> None:
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)


def _readable() -> list[str]:
    """Python's standard library and what the linker needs of it."""
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom"]
    return [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{sys.base_prefix}/lib", *libraries]
