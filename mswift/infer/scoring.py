"""Teacher-forced log-probabilities of continuations."""

# Shapes: B pairs, S longest pair, C continuation tokens, V vocabulary.

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from mswift.errors import DataError
from mswift.infer.request import Score, TokenPair
from mswift.infer.sampler import token_logprobs

BATCH_TOKENS = 4096
"""Of a forward pass, padding included."""


def score_pairs(model: PreTrainedModel, pairs: Sequence[TokenPair], use_adapter: Callable[[], None]) -> list[Score]:
    """A score for each pair. Pairs of like length share a forward pass, padded behind their end, which no token sees.

    Raises DataError for an empty prompt (its first token would have nothing to follow) or continuation.
    """
    for number, (prompt, continuation) in enumerate(pairs, start=1):
        if not prompt or not continuation:
            which = "prompt" if not prompt else "continuation"
            raise DataError(f"pair {number} to score: an empty {which}; begin with the tokenizer's start or end token")
    scores: dict[int, Score] = {}
    with torch.inference_mode():
        use_adapter()
        for batch in _batches(pairs):
            scores.update(zip(batch, _score(model, [pairs[index] for index in batch]), strict=True))
    return [scores[index] for index in range(len(pairs))]


def _batches(pairs: Sequence[TokenPair]) -> Iterator[list[int]]:
    """Indices of the pairs, longest first, in batches of at most BATCH_TOKENS (or one pair)."""
    lengths = [len(prompt) + len(continuation) for prompt, continuation in pairs]
    batch: list[int] = []
    for index in sorted(range(len(pairs)), key=lambda index: (-lengths[index], index)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _score(model: PreTrainedModel, pairs: Sequence[TokenPair]) -> list[Score]:
    rows = [[*prompt, *continuation[:-1]] for prompt, continuation in pairs]
    width = max(map(len, rows))
    device = model.device
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)  # [B, S]
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    forward: Any = model
    logits = forward(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [B, S, V]
    found = []
    for row, (prompt, continuation) in enumerate(pairs):
        own = logits[row, len(prompt) - 1 : len(prompt) - 1 + len(continuation)].float()  # [C, V]
        found.append(Score(tuple(token_logprobs([int(token) for token in continuation], own, 1))))
    return found
