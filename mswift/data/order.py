"""The order in which samples are seen: a pure function of (number of samples, seed, position).

Epoch e is a permutation of its own, drawn by Philox with the key (seed, e), and the sample at any position of it is
computed from the position alone: nothing is replayed or held, whatever the number of samples, and nothing about ranks,
micro batches or layouts enters. The permutation is a swap-or-not shuffle (V. T. Hoang, B. Morris, P. Rogaway, "An
Enciphering Scheme Based on a Card Shuffle", CRYPTO 2012): in every round, position x and its partner K - x (modulo the
number of samples) change places or not, by one hashed bit of the larger one. Unlike a Feistel network it takes any
number of samples as it is. Integers only, and Philox's raw words, whose stream numpy keeps fixed for ever.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 2
"""Goes up when a position comes to mean another sample; 1 sorted the random words of a whole epoch."""

_WORD = 2**64
_SPLITMIX = (  # shifts and factors of splitmix64 (G. Steele et al., OOPSLA 2014)
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_UPPER_BIT = np.uint64(63)


def sample_ids(num_samples: int, seed: int, start: int, count: int) -> NDArray[np.int64]:
    """Ids of the samples at positions [start, start + count) of the endless shuffled order, int64 [count].

    Position p lies in epoch p // num_samples; every epoch holds each sample once.
    """
    if num_samples < 1:
        raise ValueError(f"an order over {num_samples} samples")
    if start < 0 or count < 0:
        raise ValueError(f"positions {start} .. {start} + {count}")
    ids = np.empty(count, dtype=np.int64)
    filled = 0
    while filled < count:
        epoch, offset = divmod(start + filled, num_samples)
        length = min(count - filled, num_samples - offset)
        positions = np.arange(offset, offset + length, dtype=np.uint64)
        ids[filled : filled + length] = _shuffled(positions, num_samples, _rounds(num_samples, seed, epoch))
        filled += length
    return ids


@lru_cache(maxsize=4)
def _rounds(num_samples: int, seed: int, epoch: int) -> list[list[int]]:
    """(K, key of the hash) of every round; the paper takes 6 log2(num_samples) rounds."""
    key = np.array([seed % _WORD, epoch % _WORD], dtype=np.uint64)
    num_rounds = 16 + 6 * num_samples.bit_length()
    words = np.random.Philox(key=key).random_raw(2 * num_rounds).reshape(num_rounds, 2)
    words[:, 0] %= np.uint64(num_samples)
    return words.tolist()  # type: ignore[no-any-return]


def _shuffled(positions: NDArray[np.uint64], num_samples: int, rounds: list[list[int]]) -> NDArray[np.uint64]:
    """Samples at these positions of the epoch that `rounds` shuffle."""
    for distance, key in rounds:
        partners = (distance + num_samples) - positions
        partners = np.minimum(partners, partners - num_samples)  # below zero wraps round to more
        swapped = _hashed_bit(np.maximum(positions, partners) + key)
        positions = np.where(swapped, partners, positions)
    return positions


def _hashed_bit(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The upper bit of splitmix64, which depends on all bits: 0 or 1."""
    for shift, factor in _SPLITMIX:
        words = (words ^ (words >> shift)) * factor
    return words >> _UPPER_BIT
