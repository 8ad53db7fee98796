"""The command `mswift deploy`."""

from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mswift.agent.formats import FORMATS
from mswift.config.deploy import DeployConfig
from mswift.data.chat_template import read_chat_template
from mswift.errors import ConfigError
from mswift.infer.backends import EngineConfig, named_adapters, open_engine
from mswift.infer.engine_args import engine_args
from mswift.infer.sampling import default_sampling
from mswift.infer.server.listen import API_KEY_VARIABLE, is_own, listening, read_keys, serve, url_of

if TYPE_CHECKING:
    from fastapi import FastAPI

    from mswift.infer.child_server import ChildServer


def main(config: DeployConfig) -> int:
    """Run `mswift deploy` until SIGTERM or Ctrl-C; returns the exit status."""
    keys = _check(config)
    if config.infer_backend != "transformers":
        return _other_server(config, keys)
    with listening(config.host, config.port) as bound:
        app = _load(config, keys)
        name = config.served_model_name or Path(config.model).resolve().name
        print(f"{name} at {url_of(bound)}/v1", flush=True)
        return serve(app, bound, config.shutdown_seconds)


def _check(config: DeployConfig) -> tuple[str, ...]:
    """Refuse what cannot be, before the model is loaded; returns the keys."""
    if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        raise ConfigError(f"mswift deploy needs {', '.join(missing)}: pip install 'mswift[serve]'")
    for name in ("max_num_seqs", "max_new_tokens", "max_body_mib", "request_seconds"):
        if getattr(config, name) <= 0:
            raise ConfigError(f"--{name} {getattr(config, name)}: above 0")
    for name in ("max_waiting", "shutdown_seconds"):
        if getattr(config, name) < 0:
            raise ConfigError(f"--{name} {getattr(config, name)}: at least 0")
    if not 0 <= config.port < 65536:
        raise ConfigError(f"--port {config.port}: from 0 (a free one) to 65535")
    read_chat_template(config.chat_template)
    engine_args(config.infer_backend, config.engine_args)
    if (name := config.served_model_name or "") in named_adapters(config.adapters):
        raise ConfigError(f"--served_model_name {name}: an adapter has this name; give it another: NAME=DIRECTORY")
    keys = read_keys(config.api_key_file)
    if not keys and not config.without_api_key and not is_own(config.host):
        raise ConfigError(
            f"--host {config.host} serves other machines, and there is no key: set {API_KEY_VARIABLE} or "
            "--api_key_file, or say --without_api_key"
        )
    return keys


_OURS = ("agent_template", "max_waiting", "max_new_tokens", "max_body_mib", "request_seconds", "shutdown_seconds")
"""Options that the other servers have no word for."""
_BRANDS = {"vllm": "vLLM", "sglang": "SGLang", "lmdeploy": "LMDeploy"}


def _other_server(config: DeployConfig, keys: tuple[str, ...]) -> int:
    """The own server of another engine, to its end. Raises ConfigError for options that it would not follow."""
    from mswift.infer import other_servers, vllm_server
    from mswift.infer.child_server import ServerOptions, run_to_end

    brand = _BRANDS[config.infer_backend]
    defaults = {field.name: field.default for field in fields(DeployConfig)}
    if ours := [name for name in _OURS if getattr(config, name) != defaults[name]]:
        raise ConfigError(
            f"--{ours[0]}: {brand}'s server does not follow it; leave it out, or --infer_backend transformers"
        )
    if len(keys) > 1:
        raise ConfigError(
            f"--api_key_file {config.api_key_file}: it holds {len(keys)} keys, {brand}'s server takes one"
        )
    options = ServerOptions(
        host=config.host,
        port=config.port,
        api_key=keys[0] if keys else None,
        served_model_name=config.served_model_name,
    )
    engine = _engine_config(config)
    server: ChildServer
    if config.infer_backend == "vllm":
        server = vllm_server.VllmServer(engine, vllm_server.ServerOptions(**vars(options)))
    elif config.infer_backend == "sglang":
        server = other_servers.SglangServer(engine, options)
    else:
        server = other_servers.LmdeployServer(engine, options)
    with server:
        return run_to_end(server, (server.model, *config.adapters), brand)


def _engine_config(config: DeployConfig) -> EngineConfig:
    return EngineConfig(
        model=Path(config.model),
        adapters=named_adapters(config.adapters),
        torch_dtype=config.torch_dtype,
        device=config.device,
        chat_template=config.chat_template,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        options=engine_args(config.infer_backend, config.engine_args),
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
