"""What the proof of a layout computes, and the comparison of two results. No torch.

A difference is max|a - b| / max|b| over a tensor of the Hugging Face model (or adapter), or over the numbers of the
steps. The noise floor is what another order of the sums makes of it on one rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mswift.config.loss import LossFusion
from mswift.topology import ParallelDims

TOLERANCE = 5e-6
"""Largest difference that counts as the same computation in fp32."""


@dataclass(frozen=True)
class ProofJob:
    """What is computed; the same on every layout. `config` is a config.json.

    scaled_for: fields of the ParallelDims for which the model is scaled down first (`mswift.train.scaled_model`).

    target_modules: LoRA (rank 4) on these instead of full training. predicts: multi-token-prediction layers are part of
    the model, and trained; not beside LoRA. num_microbatches: of a step, over all
    data-parallel ranks. packed: every row holds two documents. other_order: sums in another order, for the noise floor.
    """

    config: Mapping[str, Any]
    scaled_for: Mapping[str, Any] | None = None
    target_modules: tuple[str, ...] = ()
    predicts: bool = True
    num_microbatches: int = 4
    batch: int = 2
    length: int = 24
    seed: int = 0
    packed: bool = False
    loss_fusion: LossFusion = "auto"
    cp_comm_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    other_order: bool = False


@dataclass(frozen=True)
class Difference:
    """Of one tensor, from the one-rank run; noise: of the one-rank run from itself."""

    name: str
    difference: float
    noise: float

    @property
    def proved(self) -> bool:
        """Whether it is small enough; nan is not."""
        return self.difference <= TOLERANCE

    @property
    def explained(self) -> bool:
        """Whether it is proved, or rounding: no more than ten times a noise floor that is itself above TOLERANCE.

        Such a floor is that of a gradient which cancels (that of a router which chooses one expert and normalises its
        weight is zero but for rounding), or of a model whose steps amplify rounding.
        """
        return self.proved or (self.noise > TOLERANCE and self.difference <= 10 * self.noise)


def compare(found: Mapping[str, Any], expected: Mapping[str, Any], noisy: Mapping[str, Any]) -> list[Difference]:
    """Every tensor of `expected` (the one-rank run); `noisy` is that run with `other_order`."""
    assert found.keys() == expected.keys() == noisy.keys()
    return [Difference(n, _apart(found[n], expected[n]), _apart(noisy[n], expected[n])) for n in expected]


def _apart(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """max|a - b| / max|b|; tensors that are zero in both are equal."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    apart, size = np.abs(found - expected).max(initial=0.0), np.abs(expected).max(initial=0.0)
    return float(apart / size) if apart else 0.0


def dims_from(fields: Mapping[str, Any]) -> ParallelDims:
    """A layout that went through JSON."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    return ParallelDims(**values)
