"""`vllm serve` as a process of this one (mswift.infer.child_server). Torch-free.

Its API key travels in the environment and not in its argv.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mswift.errors import ConfigError
from mswift.infer import child_server
from mswift.infer.backends import EngineConfig
from mswift.infer.child_server import ChildServer, flag, free_port
from mswift.infer.model_dir import check_model_dir
from mswift.infer.vllm_options import WORKER, vllm_environment, vllm_options, vllm_python

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ServerOptions(child_server.ServerOptions):
    """Of vLLM's server."""

    weight_updates: bool = False
    """Open the routes by which a trainer replaces the weights (mswift.infer.weight_sync); never to strangers."""


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
        argv += flag(name, value)
    if config.adapters:
        argv += ["--lora-modules", *(f"{name}={path.resolve()}" for name, path in config.adapters.items())]
    return argv


def server_environment(config: EngineConfig, options: ServerOptions, worker_home: str | None = None) -> dict[str, str]:
    """The environment of the server: this process's, the key, and what has no option.

    worker_home: a folder that holds mswift and nothing else, for weight_updates.
    """
    python, installed = vllm_python()
    environ = {**os.environ, **vllm_environment(installed, in_process=False)}
    own = environ.pop("PYTHONPATH", "")
    if paths := [path for path in (own if python == sys.executable else "", worker_home) if path]:
        environ["PYTHONPATH"] = os.pathsep.join(paths)
    environ["HF_HUB_OFFLINE"] = "1"
    environ.pop("VLLM_API_KEY", None)
    if options.api_key is not None:
        environ["VLLM_API_KEY"] = options.api_key
    if options.weight_updates:
        environ["VLLM_SERVER_DEV_MODE"] = "1"
        environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    return environ


class VllmServer(ChildServer):
    """A running server of vLLM."""

    options: ServerOptions

    def __init__(self, config: EngineConfig, options: ServerOptions | None = None) -> None:
        options = options or ServerOptions()
        if options.weight_updates and options.host not in ("127.0.0.1", "::1", "localhost"):
            raise ConfigError(
                f"--host {options.host} with weight updates: whoever reaches the server could replace its model; "
                "use --host 127.0.0.1"
            )
        check_model_dir(config.model)
        port = options.port or free_port(options.host)
        argv = server_argv(config, options, port)
        self._home = tempfile.TemporaryDirectory()
        if options.weight_updates:
            Path(self._home.name, "mswift").symlink_to(PACKAGE)
        environ = server_environment(config, options, self._home.name if options.weight_updates else None)
        model = options.served_model_name or config.model.resolve().name
        super().__init__("vLLM's server", argv, environ, options, port, model)

    def __enter__(self) -> "VllmServer":
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._home.cleanup()
