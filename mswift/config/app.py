"""What the chat page is: the frozen dataclass behind `mswift app`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class AppConfig:
    """Chat in a browser with a model: behind a server that speaks OpenAI's protocol, or one that this command starts.

    The server's key is read from the environment variable OPENAI_API_KEY or from --api_key_file; it never reaches the
    browser. The key that the page asks for is read from MSWIFT_APP_KEY or from --app_key_file.
    """

    # -- who answers: a server that runs
    url: str | None = None
    """Its address, as http://127.0.0.1:8000/v1."""
    api_key_file: str | None = None
    """url: file that holds the server's key."""

    # -- or one that is started, and ends with this command
    model: str | None = None
    """Hugging Face directory, served by mswift deploy."""
    adapters: tuple[str, ...] = ()
    """PEFT adapter directories, to be chosen on the page by the last part of their path or NAME=DIRECTORY."""
    infer_backend: Literal["transformers", "vllm", "sglang", "lmdeploy"] = "transformers"
    """As mswift deploy takes it."""
    engine_args: tuple[str, ...] = ()
    """NAME=VALUE, several: options of the infer_backend of its own, by its names, as tensor_parallel_size=2 (vllm),
    tp_size=2 (sglang), tp=2 (lmdeploy)."""
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights in memory. Default: what the checkpoint holds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own, as mswift deploy takes it."""

    # -- the page
    system: str | None = None
    """System message that a conversation begins with; it can be changed on the page."""
    host: str = "127.0.0.1"
    """Address to listen on. Another one than this machine's own needs a key of the page."""
    port: int = 7860
    """0 takes a free one; it is printed."""
    allowed_hosts: tuple[str, ...] = ()
    """Names besides localhost by which browsers may reach the page; addresses in digits always may."""
    app_key_file: str | None = None
    """File of keys, one a line, each of which opens the page."""
    without_app_key: bool = False
    """Show the page to other machines without a key."""
