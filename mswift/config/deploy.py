"""What a server is: the frozen dataclass behind `mswift deploy`."""

from dataclasses import dataclass
from typing import Literal

from mswift.config.agents import AgentTemplate


@dataclass(frozen=True, kw_only=True)
class DeployConfig:
    """Serve a model with OpenAI's routes: /v1/models, /v1/chat/completions, /v1/completions, /health, /metrics.

    The key that clients must send is read from the environment variable MSWIFT_API_KEY or from --api_key_file.
    """

    # -- model
    model: str
    """Hugging Face directory: config.json, safetensors, tokenizer."""
    adapters: tuple[str, ...] = ()
    """PEFT adapter directories; clients choose one as `model`, by the last part of its path or NAME=DIRECTORY."""
    served_model_name: str | None = None
    """What clients call the model. Default: the last part of its path."""
    infer_backend: Literal["transformers", "vllm", "sglang", "lmdeploy"] = "transformers"
    """transformers in this process, or the own server of one of the others."""
    engine_args: tuple[str, ...] = ()
    """NAME=VALUE, several: options of the infer_backend of its own, by its names, as tensor_parallel_size=2 (vllm),
    tp_size=2 (sglang), tp=2 (lmdeploy)."""
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights in memory. Default: what the checkpoint holds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own: a .jinja file, a .json file that holds one, or the
    name of one of the tokenizer's. Default: the chat_template.jinja beside adapters, else the tokenizer's own."""
    agent_template: AgentTemplate | None = None
    """How tools become text and calls are read back. Default: requests with tools are refused."""

    # -- network
    host: str = "127.0.0.1"
    """Address to listen on. Another one than this machine's own needs a key."""
    port: int = 8000
    """0 takes a free one; it is printed."""
    api_key_file: str | None = None
    """File of keys, one a line; each is accepted."""
    without_api_key: bool = False
    """Serve other machines without a key."""

    # -- limits
    max_num_seqs: int = 64
    """Answers that grow together."""
    max_waiting: int = 256
    """Answers that may wait for room; beyond it requests are refused with status 503."""
    max_model_len: int | None = None
    """Tokens of a prompt with its answer. Default: the model's own limit."""
    max_new_tokens: int = 4096
    """Longest answer in tokens that a request may ask for."""
    max_body_mib: int = 8
    """Largest request."""
    request_seconds: float = 600
    """Longest time for an answer, waiting included."""
    shutdown_seconds: float = 30
    """On SIGTERM: how long answers under way may go on."""
