"""LISA: of a model that is trained in full, a few layers at a time (Pan et al. 2024, arXiv 2403.17919). No torch."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class LayerSampling:
    """num_active of num_layers layers are trained for `interval` updates, then others, drawn by the seed.

    Every choice of layers is as likely as any other, and is a function of seed and interval alone.
    """

    num_layers: int
    num_active: int
    interval: int
    seed: int

    def active_at(self, update: int) -> Collection[int]:
        """Layers that update number `update` (from 0) changes."""
        return _drawn(self, update // self.interval)

    def updates_of(self, layer: int, done: int) -> int:
        """Of `done` updates the last ones, one after the other, that changed this layer: what its state has seen."""
        if not done or layer not in self.active_at(done - 1):
            return 0
        first = (done - 1) // self.interval * self.interval
        while first and layer in self.active_at(first - 1):
            first -= self.interval
        return done - first


@lru_cache(maxsize=16)
def _drawn(sampling: LayerSampling, number: int) -> frozenset[int]:
    def place(layer: int) -> bytes:
        return hashlib.sha256(f"{sampling.seed}:lisa:{number}:{layer}".encode()).digest()

    return frozenset(sorted(range(sampling.num_layers), key=place)[: sampling.num_active])
