"""Samples -> the arrays of one micro batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NO_CHANNEL = ""
"""Of samples whose row names none."""


@dataclass(frozen=True)
class Sample:
    """Tokens of one sample and how much each of them is learned."""

    tokens: NDArray[np.int32]
    """int32 [n]"""
    loss_weights: NDArray[np.float32]
    """float32 [n]; what predicting token t from those before it counts in the loss; 0 for the first."""
    channel: str = NO_CHANNEL
    """The name under which its loss is reported apart."""

    def counting_one(self) -> "Sample":
        """The same with weights that sum up to 1."""
        total = self.loss_weights.sum(dtype=np.float64)
        return replace(self, loss_weights=(self.loss_weights / total).astype(np.float32))


class Batch(NamedTuple):
    """One micro batch; labels are already shifted: labels[b, t] is the token that follows tokens[b, t]."""

    tokens: NDArray[np.int64]
    """int64 [batch, length]"""
    labels: NDArray[np.int64]
    """int64 [batch, length]"""
    loss_weights: NDArray[np.float32]
    """float32 [batch, length]; 0 on padding and on tokens that are not learned"""
    channels: NDArray[np.uint8]
    """uint8 [batch, length]; the place of the sample's channel in the names given; 0 where none were"""


def collate(samples: Sequence[Sample], length: int, pad_token_id: int, channel_names: Sequence[str] = ()) -> Batch:
    """Pad samples on the right to `length` positions; padding is never a target."""
    return collate_packs([[sample] for sample in samples], length, pad_token_id, channel_names)[0]


def collate_packs(
    packs: Sequence[Sequence[Sample]], length: int, pad_token_id: int, channel_names: Sequence[str] = ()
) -> tuple[Batch, tuple[int, ...]]:
    """Rows of samples side by side, each row padded on the right to `length` positions.

    Also the positions of every sample, row by row; the padding of a row counts as one more.
    """
    shape = (len(packs), length)
    tokens = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, pad_token_id, dtype=np.int64)
    loss_weights = np.zeros(shape, dtype=np.float32)
    channels = np.zeros(shape, dtype=np.uint8)
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
            channels[row, start:end] = channel_names.index(sample.channel) if channel_names else 0
            documents.append(end - start)
        if end < length:
            documents.append(length - end)
    return Batch(tokens, labels, loss_weights, channels), tuple(documents)
