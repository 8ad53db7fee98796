"""The command `mswift app`."""

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mswift.config.app import AppConfig
from mswift.errors import ConfigError, MswiftError
from mswift.infer.backends import named_adapters
from mswift.infer.child_server import ChildServer, ServerOptions, flag, free_port
from mswift.infer.model_dir import check_model_dir
from mswift.infer.server.listen import API_KEY_VARIABLE, is_own, listening, read_keys, serve, url_of
from mswift.tuners.peft_config import check_adapter_dir

if TYPE_CHECKING:
    from mswift.infer.app.pages import Upstream

KEY_VARIABLE = "OPENAI_API_KEY"
PAGE_KEY_VARIABLE = "MSWIFT_APP_KEY"
_PASSED_ON = ("adapters", "infer_backend", "engine_args", "torch_dtype", "device", "chat_template")
_SHUTDOWN_SECONDS = 2.0


def main(config: AppConfig) -> int:
    """Run `mswift app` until SIGTERM or Ctrl-C; returns the exit status."""
    keys = _check(config)
    with listening(config.host, config.port) as bound, _server(config) as (upstream, child):
        from mswift.infer.app.pages import Settings, create_app

        names = _models(upstream)
        only_own = is_own(config.host)
        settings = Settings(config.system or "", keys, (config.host, *config.allowed_hosts), only_own)
        app = create_app(upstream, settings)
        print(f"chat with {', '.join(names)} at {url_of(bound)}/", flush=True)
        with _watched(child):
            status = serve(app, bound, _SHUTDOWN_SECONDS)
        if child is not None and child.status is not None:
            raise MswiftError(f"{child.name} ended with status {child.status}:\n{child.output()}")
        return status


def _check(config: AppConfig) -> tuple[str, ...]:
    """Refuse what cannot be, before a model is loaded; returns the page's keys."""
    if missing := [name for name in ("fastapi", "uvicorn", "httpx2") if find_spec(name) is None]:
        raise ConfigError(f"mswift app needs {', '.join(missing)}: pip install 'mswift[serve]'")
    if (config.url is None) == (config.model is None):
        raise ConfigError("give --url (a server that runs, as http://127.0.0.1:8000/v1) or --model, one of them")
    if config.url is not None:
        if not config.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {config.url}: an address such as http://127.0.0.1:8000/v1")
        defaults = AppConfig()
        if given := [name for name in _PASSED_ON if getattr(config, name) != getattr(defaults, name)]:
            raise ConfigError(f"--{given[0]} is for the server that --model starts, and --url names one that runs")
    else:
        check_model_dir(Path(str(config.model)))
        for adapter in named_adapters(config.adapters).values():
            check_adapter_dir(adapter)
        if config.api_key_file is not None:
            raise ConfigError(
                f"--api_key_file {config.api_key_file} is for --url: the server of --model has its own key"
            )
    if not 0 <= config.port < 65536:
        raise ConfigError(f"--port {config.port}: from 0 (a free one) to 65535")
    keys = read_keys(config.app_key_file, PAGE_KEY_VARIABLE, "--app_key_file")
    if not keys and not config.without_app_key and not is_own(config.host):
        raise ConfigError(
            f"--host {config.host} shows the page to other machines, and it has no key: set {PAGE_KEY_VARIABLE} or "
            "--app_key_file, or say --without_app_key"
        )
    return keys


@contextlib.contextmanager
def _server(config: AppConfig) -> "Iterator[tuple[Upstream, ChildServer | None]]":
    """Who answers: the server of --url, or one of --model that ends with the block."""
    from mswift.infer.app.pages import Upstream

    if config.url is not None:
        keys = read_keys(config.api_key_file, KEY_VARIABLE)
        if len(keys) > 1:
            raise ConfigError(f"--api_key_file {config.api_key_file}: it holds {len(keys)} keys; the server takes one")
        url = config.url.rstrip("/").removesuffix("/chat/completions")
        yield Upstream(url, keys[0] if keys else None), None
        return
    key = secrets.token_urlsafe(24)
    options = ServerOptions(port=free_port("127.0.0.1"), api_key=key)
    argv = [sys.executable, "-m", "mswift.cli.main", "deploy", "--model", str(config.model)]
    argv += ["--port", str(options.port)]
    for name in _PASSED_ON:
        if value := getattr(config, name):
            argv += flag(name, value)
    environ = {**os.environ, API_KEY_VARIABLE: key}
    print(f"mswift deploy loads {config.model}", file=sys.stderr, flush=True)
    model = Path(str(config.model)).resolve().name
    with ChildServer("mswift deploy", argv, environ, options, options.port, model) as child:
        yield Upstream(f"{child.url}/v1", key), child


def _models(upstream: "Upstream") -> tuple[str, ...]:
    """What the server has. ConfigError where it does not say so."""
    import httpx2

    from mswift.infer.app.pages import models_of

    try:
        return tuple(asyncio.run(models_of(upstream)))
    except httpx2.HTTPStatusError as error:
        status = error.response.status_code
        hint = f"; its key goes into {KEY_VARIABLE} or --api_key_file" if status in (401, 403) else ""
        raise ConfigError(f"--url {upstream.url}: status {status} for its models{hint}") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        raise ConfigError(
            f"--url {upstream.url}: no server answers there ({error or type(error).__name__}); "
            "start one: mswift deploy --model DIR"
        ) from None


@contextlib.contextmanager
def _watched(child: ChildServer | None) -> Iterator[None]:
    """While inside, the end of the child ends this process's server as well."""
    if child is None:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            if child.status is not None:
                signal.raise_signal(signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
