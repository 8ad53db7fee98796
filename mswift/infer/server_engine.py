"""An engine whose model lives in a server of its own process, started here and ended with it."""

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from mswift.data.chat_template import TEMPLATE_FILE, template_of_adapters, use_chat_template
from mswift.data.tokenizer import Tokenizer
from mswift.infer.backends import EngineConfig
from mswift.infer.child_server import ChildServer, ServerOptions
from mswift.infer.loading import load_tokenizer
from mswift.infer.url_engine import Dialect, UrlEngine


class ServerEngine(UrlEngine):
    """Answers over its server, which has a key that nobody else knows and listens on 127.0.0.1 (Engine)."""

    def __init__(self, server: ChildServer, config: EngineConfig, tokenizer: Any, dialect: Dialect) -> None:
        self.server = server
        self.adapters = tuple(config.adapters)
        super().__init__(
            f"{server.url}/v1", server.model, tokenizer, config.max_num_seqs,
            key=server.options.api_key, flag=server.name, dialect=dialect,
        )  # fmt: skip

    def close(self) -> None:
        """End the server (Engine)."""
        self.server.__exit__()


def _open(
    start: Callable[[EngineConfig, ServerOptions], ChildServer], config: EngineConfig, dialect: Dialect
) -> ServerEngine:
    tokenizer = load_tokenizer(config.model)
    trained_with = template_of_adapters(list(config.adapters.values()))
    if trained_with is not None and config.chat_template is None:
        config = replace(config, chat_template=str(next(iter(config.adapters.values())) / TEMPLATE_FILE))
    if config.chat_template is not None:
        use_chat_template(cast(Tokenizer, tokenizer), config.chat_template)
    return ServerEngine(start(config, ServerOptions(api_key=secrets.token_urlsafe(24))), config, tokenizer, dialect)


def open_vllm(config: EngineConfig) -> ServerEngine:
    """vLLM of the interpreter in MSWIFT_VLLM_PYTHON. Raises ConfigError, CheckpointError and MswiftError."""
    from mswift.infer import vllm_server
    from mswift.infer.vllm_options import vllm_python

    def start(config: EngineConfig, options: ServerOptions) -> ChildServer:
        return vllm_server.VllmServer(config, vllm_server.ServerOptions(**vars(options)))

    vllm_python()

    return _open(start, config, vllm_dialect(config))


def vllm_dialect(config: EngineConfig) -> Dialect:
    """How vLLM's server is asked."""
    at_once = 1 if config.adapters else None  # PROMPT_LOGPROBS
    return Dialect("vLLM's server", own_tokens=True, n_apart=True, all_tokens=0, score_requests=at_once)


def open_sglang(config: EngineConfig) -> ServerEngine:
    """SGLang's server. Raises ConfigError, CheckpointError and MswiftError."""
    from mswift.infer.other_servers import SglangServer, sglang_python

    sglang_python()
    dialect = Dialect("SGLang's server", own_tokens=True, n_apart=True, all_tokens=-1, adapter="{model}:{adapter}")
    return _open(SglangServer, config, dialect)


def open_lmdeploy(config: EngineConfig) -> ServerEngine:
    """LMDeploy's server. Raises ConfigError, CheckpointError and MswiftError."""
    from mswift.infer.other_servers import LmdeployServer, lmdeploy_python

    lmdeploy_python()
    dialect = Dialect("LMDeploy's server", token_prompts=False, scores=False, n_apart=True, all_tokens=0)
    return _open(LmdeployServer, config, dialect)
