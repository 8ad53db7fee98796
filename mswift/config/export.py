"""Options of `mswift export`."""

from dataclasses import dataclass
from typing import Literal

from mswift.config.handover import GateEngine


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a run's model as a Hugging Face directory, or its LoRA as a PEFT adapter."""

    model: str
    """Run directory (its newest committed checkpoint is taken) or checkpoint-N."""
    output_dir: str
    """Destination directory; must not exist, or be empty."""
    to: Literal["hf", "vllm"] = "hf"
    """vllm: with the fields of config.json that vLLM needs; then `mswift handover` proves the result."""
    base_model: str | None = None
    """Of an adapter, to vllm: directory of its base. Default: what the run was started with."""
    gate_engines: tuple[GateEngine, ...] = ("megatron", "transformers", "vllm")
    """To vllm: engines that score the tokens (mswift handover --help)."""
    gate_text: str | None = None
    """To vllm: text file whose first tokens are scored. Default: random tokens."""
    gate_tokens: int = 4096
    """To vllm: how many tokens are scored."""
    tensor_model_parallel_size: int = 1
    """To vllm: ranks of the training engine that scores."""
    use_chat_template: bool = True
    """To vllm: false: the model is none to chat with, and needs no chat template."""
