"""Which generation engines there are, and how one is opened: each is imported when it is asked for. Torch-free."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from mswift.errors import ConfigError
from mswift.infer.model_dir import check_model_dir
from mswift.infer.request import Engine
from mswift.tuners.peft_config import check_adapter_dir


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is opened on; `options` are the backend's own, by its names."""

    model: Path
    """Hugging Face directory."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Name -> PEFT directory; a request chooses by name."""
    torch_dtype: str | None = None
    """float32, bfloat16 or float16; None: what the checkpoint holds."""
    device: str = "auto"
    chat_template: str | None = None
    """As --chat_template; None: that of the adapters, else the tokenizer's own."""
    max_num_seqs: int = 64
    """Answers that grow together."""
    max_model_len: int | None = None
    """Tokens of a prompt with its answer; None: the model's own limit."""
    options: Mapping[str, Any] = field(default_factory=dict)


VLLM_PYTHON = "MSWIFT_VLLM_PYTHON"
"""Environment variable: the interpreter of another environment that holds vLLM."""


@dataclass(frozen=True)
class Backend:
    """`open` is a function of an EngineConfig; `package` must be there for it (None: `open` looks for it)."""

    open: str
    package: str | None = None
    install: str = ""


BACKENDS = {
    "transformers": Backend("mswift.infer.transformers_engine:open_engine", "transformers", "pip install mswift"),
    "vllm": Backend(
        "mswift.infer.vllm_engine:open_engine", "vllm",
        f"pip install 'mswift[vllm]' (GPUs), make vllm (a CPU), or name the interpreter that has it in {VLLM_PYTHON}",
    ),
    "sglang": Backend("mswift.infer.server_engine:open_sglang"),
    "lmdeploy": Backend("mswift.infer.server_engine:open_lmdeploy"),
}  # fmt: skip
_VLLM_ELSEWHERE = Backend("mswift.infer.server_engine:open_vllm")


def open_engine(backend: str, config: EngineConfig, *, in_process: bool = False) -> Engine:
    """An engine that answers. Raises ConfigError (no such backend, not installed, not a model) and CheckpointError.

    in_process: vLLM in this process, whatever MSWIFT_VLLM_PYTHON names: for new weights, and for scores that tell the
    likeliest token by its id (servers tell it by its text).
    """
    if backend not in BACKENDS:
        raise ConfigError(f"--infer_backend {backend}: the backends are {', '.join(BACKENDS)}")
    elsewhere = backend == "vllm" and bool(os.environ.get(VLLM_PYTHON)) and not in_process
    chosen = _VLLM_ELSEWHERE if elsewhere else BACKENDS[backend]
    if chosen.package is not None and find_spec(chosen.package) is None:
        raise ConfigError(f"--infer_backend {backend}: the package {chosen.package} is not installed; {chosen.install}")
    check_model_dir(config.model)
    for path in config.adapters.values():
        check_adapter_dir(path)
    module, _, name = chosen.open.partition(":")
    return cast(Engine, getattr(import_module(module), name)(config))


def named_adapters(given: tuple[str, ...]) -> dict[str, Path]:
    """--adapters as name -> directory: NAME=DIR, or DIR, named by its last part. ConfigError for a name twice."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            name, path = Path(text).resolve().name, text
        if name in found or not name:
            raise ConfigError(f"--adapters {text}: {name!r} names another one already; give it one: NAME={path}")
        found[name] = Path(path)
    return found
