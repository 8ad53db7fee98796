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
    return collate_packs([[sample] for sample in samples], length, pad_token_id)[0]


def collate_packs(packs: Sequence[Sequence[Sample]], length: int, pad_token_id: int) -> tuple[Batch, tuple[int, ...]]:
    """Rows of samples side by side, each row padded on the right to `length` positions.

    Also the positions of every sample, row by row; the padding of a row counts as one more.
    """
    shape = (len(packs), length)
    tokens = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, pad_token_id, dtype=np.int64)
    loss_weights = np.zeros(shape, dtype=np.float32)
    documents = []
    for row, samples in enumerate(packs):
        end = 0
        for sample in samples:
            start, end = end, end + len(sample.tokens) - 1  # the last token is only a target
            if end > length:
                raise ValueError(f"samples of {end} positions in rows of {length}")
            tokens[row, start:end] = sample.tokens[:-1]
            labels[row, start:end] = sample.tokens[1:]
            loss_weights[row, start:end] = sample.loss_weights[1:]
            documents.append(end - start)
        if end < length:
            documents.append(length - end)
    return Batch(tokens, labels, loss_weights), tuple(documents)
