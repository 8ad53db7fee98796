"""One clean process that has imported everything and forks on request: every rank and command of the tests is a fork.

The server has one thread, no process group and no model, and it computes nothing, so that a fork starts as a process
of its own would after its imports. It is started on first use and ends with the pytest process, and its forks with it.
A fork has its own process group, environment and output file; it is killed and signalled by its pid. Forks of a server
share the seed of str hashes, so there are two servers, and the ranks of a job alternate: what depends on the order of a
set is found, as with programs.
"""

import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe, reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
"""The environment as it was before any test."""
STACKS = signal.SIGRTMIN + 5
"""A fork that gets this signal writes the stacks of its threads to its output, also inside a hung call."""
_PR_SET_PDEATHSIG = 1
MODULES = (
    "pytest", "hypothesis", "numpy", "safetensors.torch", "matplotlib.figure",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "mswift.cli.main", "mswift.cli.options", "mswift.parallel.megatron.engine", "mswift.train.job",
    "mswift.train.export", "tests.support.faults", "tests.support.parity", "tests.support.lora_parity",
)  # fmt: skip

NUM_SERVERS = 2
_servers: list["ForkServer"] = []


@dataclass
class Fork:
    """One process; `status` is None until a `poll` finds it ended (-n: by signal n)."""

    server: "ForkServer"
    pid: int
    status: int | None = None

    def poll(self) -> int | None:
        """The status, if it has ended."""
        if self.status is None:
            self.status = self.server.ask("poll", self.pid)
        return self.status

    def wait(self, seconds: float) -> int | None:
        """The status, if it ends within that time."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.status


_NO_THREADS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""For libraries that start one when they are imported: pyarrow's allocator, which peft brings in beside vLLM."""


class ForkServer:
    """The pytest process's end of the server; `modules` are what it imports (none: nor is torch prepared)."""

    def __init__(self, modules: Sequence[str] = MODULES) -> None:
        self._pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.server", str(theirs.fileno()), *modules],
            env=ENVIRON | _NO_THREADS, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        self._forks: list[Fork] = []

    @property
    def pid(self) -> int:
        """Of the server itself."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return self._process.poll() is None

    def fork(
        self,
        target: str,
        arguments: Sequence[Any],
        output: Path,
        environ: Mapping[str, str],
        group: int = 0,
        pipe: Connection | None = None,
    ) -> Fork:
        """A fork that calls target(*arguments), with `pipe` as the last argument if there is one, and exits.

        target: "file:function". output: the file of its two streams. group: the process group to be in, 0: its own.
        The status is 0, or as SystemExit says, or 1 for any other exception (its traceback is in the output).
        """
        output.touch()
        self._send("fork", target, tuple(arguments), str(output), dict(environ), group, pipe is not None)
        if pipe is not None:
            reduction.send_handle(self._pipe, pipe.fileno(), self.pid)
        fork = Fork(self, self._answer())
        self._forks.append(fork)
        return fork

    def ask(self, *request: Any) -> Any:
        """One request, and its answer. Raises RuntimeError when the server fails or has gone."""
        self._send(*request)
        return self._answer()

    def _send(self, *request: Any) -> None:
        try:
            self._pipe.send_bytes(pickle.dumps(request))
        except BrokenPipeError:
            self._gone()

    def _answer(self) -> Any:
        try:
            ok, answer = pickle.loads(self._pipe.recv_bytes())  # noqa: S301 - our own child
        except (EOFError, ConnectionResetError):
            self._gone()
        if not ok:
            raise RuntimeError(answer)
        return answer

    def _gone(self) -> NoReturn:
        raise RuntimeError(f"the fork server ended with status {self._process.wait()}")

    def cpu_seconds(self) -> float:
        """Of the server and all its forks, ended or not."""
        self._forks = [fork for fork in self._forks if fork.status is None]
        return sum(_cpu_seconds(pid) for pid in (self.pid, *(fork.pid for fork in self._forks)))

    def close(self) -> None:
        """End the server, and with it all forks."""
        self._pipe.close()
        self._process.wait(20)


def servers() -> list[ForkServer]:
    """Those of this process, started now if need be."""
    if not all(server.alive for server in _servers):
        _servers.clear()
    if not _servers:
        _servers.extend(ForkServer() for _ in range(NUM_SERVERS))
    return _servers


def cpu_seconds() -> float:
    """Of the servers of this process and all their forks; 0 before their start."""
    return sum(server.cpu_seconds() for server in _servers)


def load(name: str) -> Callable[..., Any]:
    """The function of "file:function" (or "module:function")."""
    file, _, function = name.partition(":")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    return getattr(module, function)  # type: ignore[no-any-return]


def threads() -> list[str]:
    """Names of the threads of this process, as the system has them."""
    return [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its children that ended; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


# -- in the server


def serve(pipe: Connection, modules: Sequence[str]) -> None:
    """Import, then answer until the other end closes."""
    if modules:
        from mswift.parallel import device

        device.prepare("cpu")
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork's collector leaves the pages of these modules alone: they stay shared
    while True:
        try:
            kind, *rest = pickle.loads(pipe.recv_bytes())  # noqa: S301 - our own parent
        except EOFError:
            return
        try:
            answer = True, _fork(pipe, *rest) if kind == "fork" else _poll(*rest)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


def _fork(
    pipe: Connection,
    target: str,
    arguments: tuple[Any, ...],
    output: str,
    environ: dict[str, str],
    group: int,
    has_pipe: bool,
) -> int:
    own = Connection(reduction.recv_handle(pipe)) if has_pipe else None
    assert len(threads()) == 1, f"the server must have one thread to fork: {threads()}"
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        pipe.close()
        _be_child(parent, target, arguments if own is None else (*arguments, own), output, environ, group)
    os.setpgid(pid, group or pid)
    if own is not None:
        own.close()
    return pid


def _poll(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _be_child(
    parent: int, target: str, arguments: tuple[Any, ...], output: str, environ: dict[str, str], group: int
) -> None:
    """Be a fork; does not return."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        os.setpgid(0, group)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.close(file)
        faulthandler.enable()
        faulthandler.register(STACKS)
        os.environ.clear()
        os.environ.update(environ)
        load(target)(*arguments)
        status = 0
    except SystemExit as ending:
        status = int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), sys.argv[2:])
