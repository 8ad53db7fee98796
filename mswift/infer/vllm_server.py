"""`vllm serve` as a process of this one: started, awaited, talked to, stopped. Torch-free.

The server listens on 127.0.0.1 unless told otherwise, its API key travels in the environment and not in its argv, and
where it ends before it is ready the end of its output is the error.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mswift.errors import ConfigError, MswiftError
from mswift.infer.backends import EngineConfig
from mswift.infer.model_dir import check_model_dir
from mswift.infer.vllm_options import WORKER, vllm_environment, vllm_options, vllm_python

ROOT = Path(__file__).resolve().parents[2]
_SHOWN_LINES = 15
_STOP_SECONDS = 20


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens and who may ask it."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: a free one."""
    api_key: str | None = None
    served_model_name: str | None = None
    """None: the directory's name."""
    weight_updates: bool = False
    """Open the routes by which a trainer replaces the weights (mswift.infer.weight_sync); never to strangers."""
    ready_seconds: float = 1800
    """How long loading may take."""


def server_argv(config: EngineConfig, options: ServerOptions, port: int) -> list[str]:
    """The command line, for no shell. Raises ConfigError and CheckpointError."""
    python, installed = vllm_python()
    named: dict[str, Any] = vllm_options(config, installed)
    model = named.pop("model")
    named["served_model_name"] = options.served_model_name or config.model.resolve().name
    if config.chat_template is not None:
        named["chat_template"] = config.chat_template
    if options.weight_updates:
        named["worker_extension_cls"] = WORKER
    argv = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    argv += ["--host", options.host, "--port", str(port)]
    for name, value in named.items():
        argv += _flag(name, value)
    if config.adapters:
        argv += ["--lora-modules", *(f"{name}={path.resolve()}" for name, path in config.adapters.items())]
    return argv


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, json.dumps(value) if isinstance(value, Mapping) else str(value)]


def server_environment(config: EngineConfig, options: ServerOptions) -> dict[str, str]:
    """The environment of the server: this process's, the key, and what has no option."""
    _, installed = vllm_python()
    environ = {**os.environ, **vllm_environment(installed, in_process=False)}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ["HF_HUB_OFFLINE"] = "1"
    environ.pop("VLLM_API_KEY", None)
    if options.api_key is not None:
        environ["VLLM_API_KEY"] = options.api_key
    if options.weight_updates:
        environ["VLLM_SERVER_DEV_MODE"] = "1"
        environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    return environ


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class VllmServer:
    """A running server; a context manager that stops it. Ready when the constructor returns."""

    def __init__(self, config: EngineConfig, options: ServerOptions | None = None) -> None:
        self.options = options or ServerOptions()
        if self.options.weight_updates and self.options.host not in ("127.0.0.1", "::1", "localhost"):
            raise ConfigError(
                f"--host {self.options.host} with weight updates: whoever reaches the server could replace its model; "
                "use --host 127.0.0.1"
            )
        check_model_dir(config.model)
        port = self.options.port or free_port(self.options.host)
        self.url = f"http://{self.options.host}:{port}"
        self.model = self.options.served_model_name or config.model.resolve().name
        argv = server_argv(config, self.options, port)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
        self._process = subprocess.Popen(
            argv,
            env=server_environment(config, self.options),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._await_health()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Of the server's first process."""
        return self._process.pid

    def _await_health(self) -> None:
        deadline = time.monotonic() + self.options.ready_seconds
        while time.monotonic() < deadline:
            status = self._process.poll()
            if status is not None:
                raise MswiftError(f"vLLM's server ended with status {status} before it was ready:\n{self.output()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.2)
        raise MswiftError(
            f"vLLM's server was not ready after {self.options.ready_seconds:.0f} seconds:\n{self.output()}"
        )

    def output(self, num_lines: int = _SHOWN_LINES) -> str:
        """The last lines that the server wrote."""
        self._output.seek(0)
        return "\n".join(self._output.read().decode(errors="replace").splitlines()[-num_lines:])

    def post(self, path: str, content: Mapping[str, Any] | None = None, query: str = "") -> Any:
        """POST of JSON; the JSON of the answer, None where it has no body. MswiftError with the server's words."""
        headers = {"Content-Type": "application/json"}
        if self.options.api_key is not None:
            headers["Authorization"] = f"Bearer {self.options.api_key}"
        data = json.dumps(content or {}).encode()
        request = urllib.request.Request(f"{self.url}{path}{query}", data, headers, method="POST")
        try:
            with urllib.request.urlopen(request) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            raise MswiftError(f"vLLM's server refused {path}: {error.code} {error.read().decode()[:500]}") from None
        except OSError as error:
            raise MswiftError(f"vLLM's server did not answer {path}: {error}\n{self.output()}") from None
        return _json(body)

    def wait(self) -> int:
        """Until it ends; its status."""
        return self._process.wait()

    def stop(self) -> None:
        """End the server and its workers, by their own process group; its requests under way get a moment."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # workers that outlive it
        self._process.wait()

    def __enter__(self) -> "VllmServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._output.close()


def _json(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError:
        return body.decode(errors="replace")


@contextlib.contextmanager
def forwarded_signals(server: VllmServer) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM stop the server."""

    def stop(*_: object) -> None:
        os.kill(server.pid, signal.SIGTERM)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def serve(config: EngineConfig, options: ServerOptions) -> int:
    """`mswift deploy --infer_backend vllm`: start the server, say where it is, run to its end; the exit status."""
    with VllmServer(config, options) as server:
        names: Sequence[str] = (server.model, *config.adapters)
        print(f"vLLM serves {', '.join(names)} at {server.url}/v1 (pid {server.pid}); Ctrl-C stops it", flush=True)
        with forwarded_signals(server):
            status = server.wait()
        if status not in (0, -signal.SIGTERM, -signal.SIGINT):
            raise MswiftError(f"vLLM's server ended with status {status}:\n{server.output()}")
    return 0
