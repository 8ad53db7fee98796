"""An HTTP server as a process of this one: started, awaited, talked to, stopped. Torch-free.

It listens on 127.0.0.1 unless told otherwise, and where it ends before it is ready the end of its output is the error.
On Linux it gets SIGTERM when this process dies, however it dies.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mswift.errors import MswiftError
from mswift.infer.direct import urlopen

_SHOWN_LINES = 15
_SHOWN_BYTES = 1 << 16
_STOP_SECONDS = 20
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens, who may ask it, and what it calls the model."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: a free one."""
    api_key: str | None = field(default=None, repr=False)
    served_model_name: str | None = None
    """None: the directory's name."""
    ready_seconds: float = 1800
    """How long loading may take."""


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def flag(name: str, value: Any, *, no: str = "no-") -> list[str]:
    """An option as its flag: lists as several values, mappings as JSON, false as --no-NAME (`no` empty: left out)."""
    spelled = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [spelled] if value else [f"--{no}{spelled[2:]}"] if no else []
    if isinstance(value, list | tuple):
        return [spelled, *map(str, value)]
    return [spelled, json.dumps(value) if isinstance(value, Mapping) else str(value)]


class ChildServer:
    """A running server; a context manager that stops it. Ready when the constructor returns."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        environ: Mapping[str, str],
        options: ServerOptions,
        port: int,
        model: str,
        health: str = "/health",
    ) -> None:
        """name: as errors call it; argv: for no shell; port: the one that argv names; model: its name there."""
        self.name = name
        self.options = options
        host = f"[{options.host}]" if ":" in options.host else options.host
        self.url = f"http://{host}:{port}"
        self.model = model
        self._health = health
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
        try:
            self._process = subprocess.Popen(
                argv,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if _libc is not None else None,
            )
        except OSError as error:
            raise MswiftError(f"{name} could not be started: {argv[0]}: {error.strerror}") from None
        try:
            self._await_health()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Of the server's first process."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """None while it runs, then its exit status."""
        return self._process.poll()

    def _await_health(self) -> None:
        deadline = time.monotonic() + self.options.ready_seconds
        request = urllib.request.Request(self.url + self._health)
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urlopen(request, timeout=5, is_ours=True):
                if self.status is None:  # it answered, not another one on its port
                    return
            if self.status is not None:
                raise MswiftError(f"{self.name} ended with status {self.status} before it was ready:\n{self.output()}")
            time.sleep(0.2)
        raise MswiftError(f"{self.name} was not ready after {self.options.ready_seconds:g} seconds:\n{self.output()}")

    def output(self, num_lines: int = _SHOWN_LINES) -> str:
        """The last lines that the server wrote."""
        size = os.fstat(self._output.fileno()).st_size
        start = max(size - _SHOWN_BYTES, 0)
        data = os.pread(self._output.fileno(), size - start, start)  # its place in the file is the server's as well
        return "\n".join(data.decode(errors="replace").splitlines()[-num_lines:])

    def post(self, path: str, content: Mapping[str, Any] | None = None, query: str = "") -> Any:
        """POST of JSON; the JSON of the answer, None where it has no body. MswiftError with the server's words."""
        headers = {"Content-Type": "application/json"}
        if self.options.api_key is not None:
            headers["Authorization"] = f"Bearer {self.options.api_key}"
        data = json.dumps(content or {}).encode()
        request = urllib.request.Request(f"{self.url}{path}{query}", data, headers, method="POST")
        try:
            with urlopen(request, is_ours=True) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            raise MswiftError(f"{self.name} refused {path}: {error.code} {error.read().decode()[:500]}") from None
        except OSError as error:
            raise MswiftError(f"{self.name} did not answer {path}: {error}\n{self.output()}") from None
        return _json(body)

    def wait(self) -> int:
        """Until it ends; its status."""
        return self._process.wait()

    def stop(self) -> None:
        """End the server and its workers, by their own process group; its requests under way get a moment."""
        if self.status is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # workers that outlive it
        self._process.wait()

    def __enter__(self) -> "ChildServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._output.close()


def _end_with_parent() -> None:
    assert _libc is not None
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _json(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError:
        return body.decode(errors="replace")


@contextlib.contextmanager
def forwarded_signals(server: ChildServer) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM stop the server."""

    def stop(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server.pid, signal.SIGTERM)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_to_end(server: ChildServer, names: Sequence[str], brand: str) -> int:
    """Say where a server is, and wait for its end; the exit status."""
    with forwarded_signals(server):  # first: who reads the line may stop it at once
        print(f"{brand} serves {', '.join(names)} at {server.url}/v1 (pid {server.pid}); Ctrl-C stops it", flush=True)
        status = server.wait()
    if status not in (0, -signal.SIGTERM, -signal.SIGINT):
        raise MswiftError(f"{server.name} ended with status {status}:\n{server.output()}")
    return 0
