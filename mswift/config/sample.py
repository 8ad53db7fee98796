"""What sampling is: the frozen dataclass behind `mswift sample`."""

from dataclasses import dataclass
from typing import Literal

JUDGE_PROMPT = (
    "Question:\n{prompt}\n\nReference:\n{label}\n\nAnswer:\n{completion}\n\n"
    "How good is the answer, from 0 to 10? Write the number only."
)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Answer each row several times, score the answers, keep the best one of each row as training data."""

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
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own."""

    # -- what to answer
    val_dataset: tuple[str, ...]
    """Files to answer; PATH#N takes the first N rows. A row's last assistant turn is its label."""
    system: str | None = None
    """System message for conversations that have none."""
    result_path: str
    """Every answer with its score, one JSON object a row; a half-written file is continued."""
    best_path: str | None = None
    """The best answer of each row as a conversation to fine-tune on; rows whose best score is below
    min_score are left out."""
    max_batch_size: int = 8
    """Rows answered together."""

    # -- scores
    reward: str = "exact_match"
    """exact_match: 1 where the answer is the label, else 0. regex:PATTERN: 1 where its last match (the first group,
    where there is one) is the label. FILE.py: its function reward(prompts, completions, label) returns a number
    for each; it is run as it is. judge: a model at judge_url gives it."""
    judge_url: str | None = None
    """reward judge: an OpenAI address that ends with /v1; its key in MSWIFT_JUDGE_API_KEY."""
    judge_model: str | None = None
    """reward judge: the name of the model there."""
    judge_prompt: str = JUDGE_PROMPT
    """reward judge: what it is asked; the first number in its reply, behind its thinking, is the score."""
    min_score: float = 1.0
    """From this score on an answer counts as passed, for pass_at and best_path."""
    pass_at: tuple[int, ...] = ()
    """k of pass@k, estimated without bias from the num_samples answers of each row. Default: 1 and num_samples."""

    # -- sampling
    num_samples: int = 8
    """Answers to each row."""
    max_new_tokens: int = 512
    """Longest answer in tokens."""
    temperature: float | None = None
    """Default: the model's generation_config.json; 1 where that does not sample."""
    top_p: float | None = None
    """Default: generation_config.json, else 1."""
    top_k: int | None = None
    """Default: generation_config.json, else 0."""
    min_p: float | None = None
    """Default: generation_config.json, else 0."""
    repetition_penalty: float | None = None
    """Default: generation_config.json, else 1."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""
    seed: int = 42
    """Seed of the sampling."""
