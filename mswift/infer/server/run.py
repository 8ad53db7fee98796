"""The command `mswift deploy`."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mswift.agent.formats import FORMATS
from mswift.config.deploy import DeployConfig
from mswift.data.chat_template import read_chat_template
from mswift.errors import ConfigError
from mswift.infer.backends import EngineConfig, named_adapters, open_engine
from mswift.infer.sampling import default_sampling

if TYPE_CHECKING:
    from fastapi import FastAPI

API_KEY_VARIABLE = "MSWIFT_API_KEY"


def main(config: DeployConfig) -> int:
    """Run `mswift deploy` until SIGTERM or Ctrl-C; returns the exit status."""
    keys = _check(config)
    if config.infer_backend == "vllm":
        return _vllm(config, keys)
    with _listening(config.host, config.port) as bound:
        app = _load(config, keys)
        host, port = bound.getsockname()[:2]
        name = config.served_model_name or Path(config.model).resolve().name
        print(f"{name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        return serve(app, bound, config.shutdown_seconds)


def _check(config: DeployConfig) -> tuple[str, ...]:
    """Refuse what cannot be, before the model is loaded; returns the keys."""
    if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        raise ConfigError(f"mswift deploy needs {', '.join(missing)}: pip install mswift[serve]")
    for name in ("max_num_seqs", "max_new_tokens", "max_body_mib", "request_seconds"):
        if getattr(config, name) <= 0:
            raise ConfigError(f"--{name} {getattr(config, name)}: above 0")
    for name in ("max_waiting", "shutdown_seconds"):
        if getattr(config, name) < 0:
            raise ConfigError(f"--{name} {getattr(config, name)}: at least 0")
    if not 0 <= config.port < 65536:
        raise ConfigError(f"--port {config.port}: from 0 (a free one) to 65535")
    read_chat_template(config.chat_template)
    if (name := config.served_model_name or "") in named_adapters(config.adapters):
        raise ConfigError(f"--served_model_name {name}: an adapter has this name; give it another: NAME=DIRECTORY")
    keys = read_keys(config.api_key_file)
    if not keys and not config.without_api_key and not _is_own(config.host):
        raise ConfigError(
            f"--host {config.host} serves other machines, and there is no key: set {API_KEY_VARIABLE} or "
            "--api_key_file, or say --without_api_key"
        )
    return keys


def read_keys(path: str | None) -> tuple[str, ...]:
    """Keys of the file, else of the environment variable. ConfigError for a file that has none."""
    if path is None:
        return tuple(key for key in (os.environ.get(API_KEY_VARIABLE, "").strip(),) if key)
    if not Path(path).is_file():
        raise ConfigError(f"--api_key_file {path}: no such file")
    keys = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    if not keys:
        raise ConfigError(f"--api_key_file {path}: it holds no key")
    return keys


def _is_own(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket. ConfigError where the address is taken or not this machine's."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}") from None
    with bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
            bound.listen(2048)
        except OSError as error:
            raise ConfigError(f"--host {host} --port {port}: {error.strerror}; --port 0 takes a free one") from None
        yield bound


_OURS = ("agent_template", "max_waiting", "max_new_tokens", "max_body_mib", "request_seconds", "shutdown_seconds")
"""Options that vLLM's server has no word for."""


def _vllm(config: DeployConfig, keys: tuple[str, ...]) -> int:
    """vLLM's own server, to its end. Raises ConfigError for options that it would not follow."""
    from mswift.infer.vllm_server import ServerOptions, serve

    defaults = {field.name: field.default for field in fields(DeployConfig)}
    if ours := [name for name in _OURS if getattr(config, name) != defaults[name]]:
        raise ConfigError(
            f"--{ours[0]}: vLLM's server does not follow it; leave it out, or --infer_backend transformers"
        )
    if len(keys) > 1:
        raise ConfigError(f"--api_key_file {config.api_key_file}: it holds {len(keys)} keys, vLLM's server takes one")
    options = ServerOptions(
        host=config.host,
        port=config.port,
        api_key=keys[0] if keys else None,
        served_model_name=config.served_model_name,
    )
    return serve(_engine_config(config), options)


def _engine_config(config: DeployConfig) -> EngineConfig:
    return EngineConfig(
        model=Path(config.model),
        adapters=named_adapters(config.adapters),
        torch_dtype=config.torch_dtype,
        device=config.device,
        chat_template=config.chat_template,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
    )


def _load(config: DeployConfig, keys: tuple[str, ...]) -> "FastAPI":
    from mswift.infer.server.app import Limits, create_app
    from mswift.infer.server.translate import Served
    from mswift.infer.server.worker import SteppedEngine, Worker

    adapters = named_adapters(config.adapters)
    engine = open_engine(config.infer_backend, _engine_config(config))
    served = Served(
        model=config.served_model_name or Path(config.model).resolve().name,
        adapters=tuple(adapters),
        max_new_tokens=config.max_new_tokens,
        max_answers=config.max_num_seqs + config.max_waiting,
        defaults=replace(default_sampling(Path(config.model)), stop=()),
        agent=FORMATS[config.agent_template] if config.agent_template else None,
    )
    limits = Limits(
        max_body_bytes=config.max_body_mib * 2**20,
        body_seconds=min(30.0, config.request_seconds),
        request_seconds=config.request_seconds,
        keys=keys,
    )
    return create_app(Worker(cast(SteppedEngine, engine), served.max_answers), served, limits)


def serve(app: "FastAPI", bound: socket.socket, shutdown_seconds: float) -> int:
    """Answer on a bound socket until SIGTERM or SIGINT; answers under way have time to end."""
    import uvicorn

    class Server(uvicorn.Server):
        """Signals end it with exit status 0."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            handled = (signal.SIGTERM, signal.SIGINT)
            previous = {number: signal.signal(number, self.handle_exit) for number in handled}
            try:
                yield
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)

    server = Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=max(1, round(shutdown_seconds)),
            timeout_keep_alive=30,
            server_header=False,
            h11_max_incomplete_event_size=64 * 1024,
        )
    )
    server.run(sockets=[bound])
    return 0 if server.started else 1
