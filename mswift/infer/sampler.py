"""The next token of each row by its own sampling settings and its own random stream."""

# Shapes: B rows, V vocabulary.

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mswift.errors import CheckpointError
from mswift.infer.request import Sampling, TokenLogprob

_COLDEST = 1e-30
"""Temperature below which the likeliest token is certain, and by which no logit becomes infinite."""


class RowSampler:
    """Chooses the tokens of one answer.

    A draw is the argmax of log p - log e with e ~ Exp(1): it is token i with probability p_i (the exponential race,
    also known as the Gumbel-max trick). The noise comes from the row's own generator on the CPU, so that an answer
    depends on its seed and not on the batch, the order of the requests or the device.
    """

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed) if sampling.temperature > 0 else None
        self._processors: list[LogitsProcessor] = []
        if sampling.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
        self._needs_tokens = bool(self._processors)
        if self._generator is not None:
            self._processors += _warpers(sampling)

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether the row is greedy and nothing changes its logits."""
        return not self._processors

    def choose(self, tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """The next token, int64 [1], behind `tokens`; logits [V] float32."""
        ids = torch.tensor([list(tokens) if self._needs_tokens else []], dtype=torch.long, device=logits.device)
        scores = logits[None]
        for processor in self._processors:
            scores = processor(ids, scores)  # type: ignore[arg-type]
        if self._generator is not None:
            noise = torch.empty(scores.shape[-1]).exponential_(generator=self._generator)
            noise = noise.clamp_min(torch.finfo(torch.float32).tiny).log().to(scores.device)
            scores = scores.log_softmax(-1) - noise
        return scores.argmax(-1)


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(max(float(sampling.temperature), _COLDEST))]
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(top_k=sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(top_p=sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(min_p=sampling.min_p))
    return warpers


def choose_tokens(samplers: Sequence[RowSampler], before: Sequence[Sequence[int]], logits: torch.Tensor) -> list[int]:
    """The next token of each row; `before`: all tokens of the row; logits [B, V] float32.

    CheckpointError where they are no numbers.
    """
    if bool(logits.isnan().any()):
        raise CheckpointError(
            "the model's logits are nan: its weights hold nan or inf, or it overflows in this dtype; try "
            "--torch_dtype float32, or give another --model"
        )
    chosen = logits.argmax(-1)
    for row, sampler in enumerate(samplers):
        if not sampler.takes_the_likeliest:
            chosen[row] = sampler.choose(before[row], logits[row])[0]
    return [int(token) for token in chosen.tolist()]


def token_logprobs(tokens: Sequence[int], logits: torch.Tensor, num_top: int) -> list[TokenLogprob]:
    """Log-probability of tokens [B], with the `num_top` likeliest of each place; logits [B, V] float32."""
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    top = [tuple(zip(row_ids, row, strict=True)) for row_ids, row in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*entry) for entry in zip(tokens, own, top, strict=True)]
