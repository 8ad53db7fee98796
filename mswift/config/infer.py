"""What an inference run is: the frozen dataclass behind `mswift infer`."""

from dataclasses import dataclass
from typing import Literal

from mswift.config.agents import AgentTemplate


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """Answer with a model: a chat (default), one or several prompts, or a data set to a results file."""

    # -- model
    model: str
    """Hugging Face directory: config.json, safetensors, tokenizer."""
    adapters: tuple[str, ...] = ()
    """PEFT adapter directory (one), or NAME=DIRECTORY."""
    infer_backend: Literal["transformers", "vllm", "sglang", "lmdeploy"] = "transformers"
    """Generation engine."""
    engine_args: tuple[str, ...] = ()
    """NAME=VALUE, several: options of the infer_backend of its own, by its names, as tensor_parallel_size=2 (vllm),
    tp_size=2 (sglang), tp=2 (lmdeploy)."""
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights in memory. Default: what the checkpoint holds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""

    # -- what to answer
    prompt: tuple[str, ...] = ()
    """Prompts, each answered alone: a user turn of the model's chat template, or plain text to continue."""
    val_dataset: tuple[str, ...] = ()
    """Files to answer; PATH#N takes the first N rows. A row's last assistant turn is kept as its label."""
    result_path: str | None = None
    """val_dataset: the results, one JSON object a row; a half-written file is continued."""
    max_batch_size: int = 8
    """Rows answered together."""
    system: str | None = None
    """System message for conversations that have none."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own: a .jinja file, a .json file that holds one, or the
    name of one of the tokenizer's. Default: the chat_template.jinja beside adapters, else the tokenizer's own."""
    agent_template: AgentTemplate | None = None
    """How rows with tools, calls and results become text. Default: by the chat template, which gets the tools.
    With it the results of val_dataset hold the calls of each answer."""
    use_chat_template: bool = True
    """false: continue prompts and questions as plain text."""

    markdown: bool = True
    """Chat at a terminal where the package rich is installed: answers are formatted. Pipes always get plain text."""

    # -- sampling
    max_new_tokens: int = 512
    """Longest answer in tokens."""
    temperature: float | None = None
    """0 is greedy. Default: the model's generation_config.json; greedy where that does not sample."""
    top_p: float | None = None
    """Sample from the likeliest tokens whose probabilities sum to top_p. Default: generation_config.json, else 1."""
    top_k: int | None = None
    """Sample from the top_k likeliest tokens; 0 is all. Default: generation_config.json, else 0."""
    min_p: float | None = None
    """Sample from tokens at least this likely, as a share of the likeliest one's probability. Default:
    generation_config.json, else 0."""
    repetition_penalty: float | None = None
    """Above 1: tokens that are there already become less likely. Default: generation_config.json, else 1."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""
    seed: int = 42
    """Seed of the sampling; an answer does not depend on the batch that it was computed in."""
