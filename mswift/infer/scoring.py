"""Teacher-forced log-probabilities of continuations."""

# Shapes: B pairs, S longest pair, C continuation tokens, V vocabulary.

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from mswift.errors import DataError
from mswift.infer.batch_cache import new_cache
from mswift.infer.request import Score, TokenPair
from mswift.infer.sampler import token_logprobs
from mswift.infer.virtual import NOTHING, Front

BATCH_TOKENS = 4096
"""Of a forward pass, padding included."""


def score_pairs(
    model: PreTrainedModel, pairs: Sequence[TokenPair], use_adapter: Callable[[], None], front: Front = NOTHING
) -> list[Score]:
    """A score for each pair. Pairs of like length share a forward pass, padded behind their end, which no token sees.

    front: what stands before each.
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
            scores.update(zip(batch, _score(model, [pairs[index] for index in batch], front), strict=True))
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


def _score(model: PreTrainedModel, pairs: Sequence[TokenPair], front: Front) -> list[Score]:
    rows = [[*front.ids, *prompt, *continuation[:-1]] for prompt, continuation in pairs]
    width = max(map(len, rows))
    device = model.device
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)  # [B, S]
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    forward: Any = model
    cache: dict[str, Any] = {}
    if front.prefix is not None:
        cache = {"past_key_values": new_cache(getattr(forward, "get_base_model", lambda: forward)())}
        front.fill(cache["past_key_values"], len(rows))
        mask = torch.cat([front.mask(len(rows), device), mask], dim=1)
    logits = forward(input_ids=ids, attention_mask=mask, use_cache=bool(cache), **cache).logits  # [B, S, V]
    found = []
    for row, (prompt, continuation) in enumerate(pairs):
        last = len(front.ids) + len(prompt) - 1
        own = logits[row, last : last + len(continuation)].float()  # [C, V]
        found.append(Score(tuple(token_logprobs([int(token) for token in continuation], own, 1))))
    return found
