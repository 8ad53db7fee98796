"""The order in which samples are seen: a pure function of (number of samples, seed, position).

Epoch e is a permutation drawn by Philox with the key (seed, e): any position is reached without replaying the ones
before it, and nothing about ranks, micro batches or layouts enters. The permutation is the stable argsort of Philox's
raw words, since numpy keeps the bit stream of a generator fixed for ever but not the algorithm of
`Generator.permutation`.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_WORD = 2**64


@lru_cache(maxsize=2)
def epoch_permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Order of the samples in one epoch, int64 [num_samples], read-only."""
    key = np.array([seed % _WORD, epoch % _WORD], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(num_samples)
    permutation = np.argsort(words, kind="stable").astype(np.int64, copy=False)
    permutation.flags.writeable = False
    return permutation


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
        piece = epoch_permutation(num_samples, seed, epoch)[offset : offset + count - filled]
        ids[filled : filled + len(piece)] = piece
        filled += len(piece)
    return ids
