"""The learning rate as a pure function of the step, as megatron-core's OptimizerParamScheduler computes it."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from 0, then a decay from `peak` to `floor`; all lengths in optimizer steps."""

    peak: float
    floor: float
    style: Literal["cosine", "linear", "constant", "WSD"]
    warmup_iters: int
    decay_iters: int
    wsd_decay_iters: int = 0
    wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"

    def at(self, step: int) -> float:
        """Learning rate of the update that follows `step` finished ones (so the first step of a warm-up has 0)."""
        if self.warmup_iters and step <= self.warmup_iters:
            return self.peak * step / self.warmup_iters
        if self.style == "constant":
            return self.peak
        if step > self.decay_iters:
            return self.floor
        if self.style == "WSD":
            return self.floor + self._wsd(step) * (self.peak - self.floor)
        done = (step - self.warmup_iters) / (self.decay_iters - self.warmup_iters)
        left = 1.0 - done if self.style == "linear" else 0.5 * (math.cos(math.pi * done) + 1.0)
        return self.floor + left * (self.peak - self.floor)

    def _wsd(self, step: int) -> float:
        """Share of (peak - floor) left in the final decay of warm-up, stable, decay."""
        start = self.decay_iters - self.wsd_decay_iters
        if step <= start:
            return 1.0
        done = (step - start) / self.wsd_decay_iters
        match self.wsd_decay_style:
            case "linear":
                return 1.0 - done
            case "cosine":
                return 0.5 * (math.cos(math.pi * done) + 1.0)
            case "exponential":
                return 2.0 * math.pow(0.5, done) - 1.0
            case "minus_sqrt":
                return 1.0 - math.sqrt(done)
