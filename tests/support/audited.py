"""A command whose opened files, connections and children are written down from a moment on: by the interpreter's audit
events always, by strace where it is installed and may attach (that sees what libraries in C and Rust open as well).
"""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from tests.support.deployed import Running

ROOT = Path(__file__).resolve().parents[2]
_EVENTS = (
    "open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.mkdir", "glob.glob", "ctypes.dlopen",
    "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.system", "socket.connect", "socket.getaddrinfo",
    "urllib.Request",
)  # fmt: skip
_WRITER = f"""
import json, os, sys
told = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
events = {_EVENTS!r}
def hook(event, arguments):
    if event in events:
        os.write(told, (json.dumps([event, repr(arguments[0] if arguments else "")]) + "\\n").encode())
sys.addaudithook(hook)
"""
_COMMAND = "from mswift.cli.main import console\nconsole()\n"
_SYSCALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)$")


class Audited(Running):
    """A server of which it is known what it touched since `begin`."""

    def __init__(self, log: Path, *words: str, code: str = _COMMAND, **environment: str) -> None:
        """code: what is run with the words; default: mswift's command."""
        self._log = log
        self._strace: subprocess.Popen[bytes] | None = None
        self._trace = log.with_suffix(".strace")
        program = (sys.executable, "-c", _WRITER + code)
        super().__init__(*words, program=program, AUDIT_LOG=str(log), **environment)

    def begin(self) -> list[list[str]]:
        """From now on; returns the events until now."""
        before = self._events()
        if shutil.which("strace"):
            traced = "trace=%file,%network,%process"
            argv = [
                "strace",
                "-f",
                "-qq",
                "-s",
                "300",
                "-e",
                traced,
                "-o",
                str(self._trace),
                "-p",
                str(self.process.pid),
            ]
            self._strace = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
            time.sleep(1)
            if self._strace.poll() is not None:  # it may not attach here
                self._strace = None
        self._start = len(before)
        return before

    def _events(self) -> list[list[str]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def touched(self) -> tuple[list[list[str]], list[tuple[str, str]] | None]:
        """Audit events and system calls (None without strace) since `begin`."""
        events = self._events()[self._start :]
        if self._strace is None:
            return events, None
        self._strace.terminate()  # it detaches
        self._strace.wait(30)
        calls = [match.groups() for line in self._trace.read_text().splitlines() if (match := _SYSCALL.match(line))]
        return events, [(name, rest) for name, rest in calls]


def is_code(path: str) -> bool:
    """Whether a file is a module of Python, of an installed package or of mswift: imported late, whatever is asked."""
    homes = [sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), *site.getsitepackages(), str(ROOT / "mswift")]
    real = os.path.realpath(path)
    return real.endswith((".py", ".pyc", ".so")) and any(
        real.startswith(os.path.realpath(home) + "/") for home in homes
    )
