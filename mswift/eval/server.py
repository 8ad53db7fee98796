"""What other harnesses are told of the server that they ask, and their own arguments. Torch-free."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mswift.config.eval import EvalConfig
from mswift.errors import ConfigError
from mswift.infer.url_engine import KEY, UrlEngine


@dataclass(frozen=True)
class Server:
    """An address that ends with /v1, the model's name there, the key, and --eval_args."""

    url: str
    model: str
    key: str
    arguments: Mapping[str, Any]
    about: Mapping[str, Any]


def server_of(config: EvalConfig) -> Server:
    """The server of --eval_url, which answers. Raises ConfigError."""
    if config.eval_url is None:
        raise ConfigError(
            f"--eval_backend {config.eval_backend} asks a server: start one (mswift deploy --model DIR, vllm serve "
            "DIR) and give its address, --eval_url http://127.0.0.1:8000/v1"
        )
    engine = UrlEngine(config.eval_url, config.served_model_name, None, config.max_batch_size)
    about = {"model": engine.model, "engine": f"server {engine.url}"}
    return Server(engine.url, engine.model, os.environ.get(KEY, "EMPTY"), arguments_of(config), about)


def arguments_of(config: EvalConfig) -> dict[str, Any]:
    """--eval_args by name: JSON where it is JSON, else text."""
    arguments: dict[str, Any] = {}
    for given in config.eval_args:
        name, equals, value = given.partition("=")
        if not equals:
            raise ConfigError(f"--eval_args {given}: write NAME=VALUE")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments
