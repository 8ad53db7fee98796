"""Samples -> the arrays of one micro batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """Tokens of one sample and how much each of them is learned."""

    tokens: NDArray[np.int32]
    """int32 [n]"""
    loss_weights: NDArray[np.float32]
    """float32 [n]; what predicting token t from those before it counts in the loss; 0 for the first."""


class Batch(NamedTuple):
    """One micro batch; labels are already shifted: labels[b, t] is the token that follows tokens[b, t]."""

    tokens: NDArray[np.int64]
    """int64 [batch, length]"""
    labels: NDArray[np.int64]
    """int64 [batch, length]"""
    loss_weights: NDArray[np.float32]
    """float32 [batch, length]; 0 on padding and on tokens that are not learned"""


def collate(samples: Sequence[Sample], length: int, pad_token_id: int) -> Batch:
    """Pad samples on the right to `length` positions; padding is never a target."""
    shape = (len(samples), length)
    tokens = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, pad_token_id, dtype=np.int64)
    loss_weights = np.zeros(shape, dtype=np.float32)
    for row, sample in enumerate(samples):
        positions = len(sample.tokens) - 1  # the last token is only a target
        if positions > length:
            raise ValueError(f"a sample of {positions} positions in a batch of length {length}")
        tokens[row, :positions] = sample.tokens[:-1]
        labels[row, :positions] = sample.tokens[1:]
        loss_weights[row, :positions] = sample.loss_weights[1:]
    return Batch(tokens, labels, loss_weights)
