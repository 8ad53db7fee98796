"""Options of `mswift handover`, the gate before a model is served."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

GateEngine = Literal["megatron", "transformers", "vllm"]


@dataclass(frozen=True, kw_only=True)
class HandoverConfig:
    """Prove that a model directory is what was trained, and that vLLM computes it as the training engine does.

    Files against config.json, bits against the run, log-probabilities of the same tokens in float32 in each engine.
    The report lies beside the model (handover.json, handover.md); so does serve.sh, if all holds. Exit status 1 if not.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Hugging Face directory; of an adapter: its base."""
    adapters: str | None = None
    """PEFT adapter on the model; the merged model is proved too. The report lies beside the adapter then."""
    run: str | None = None
    """Run or checkpoint-N that it was exported from: compared bit for bit, and what the training engine reads."""
    gate_engines: tuple[GateEngine, ...] = ("megatron", "transformers", "vllm")
    """Engines that score the tokens. None of them: only files are looked at."""
    gate_text: str | None = None
    """Text file whose first tokens are scored. Default: random tokens."""
    gate_tokens: int = 4096
    """How many tokens are scored."""
    use_chat_template: bool = True
    """false: the model is none to chat with, and needs no chat template."""
    tensor_model_parallel_size: int = 1
    """Ranks of the training engine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Of the training engine and transformers."""
