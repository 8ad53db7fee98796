"""Q-GaLore's update rule for the matrices of layers: Zhang et al. 2024 (arXiv 2407.08296).

Of the paper are in: projections in four bits, found anew ever less often, and Adam's moments in eight bits. Not in:
weights in eight bits with stochastic rounding (an engine keeps fp32 weights), and updates within the backward pass.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mswift.config.optimizers import LowRank
from mswift.parallel.fsdp.config import HfSettings
from mswift.parallel.fsdp.libraries import AdamW8bit, GaLore, Settings
from mswift.parallel.fsdp.projection import Projection


class QGaLore(AdamW8bit):
    """bitsandbytes' Adam on stand-ins of the projected matrices, whose steps are projected back."""

    def __init__(self, config: HfSettings, settings: Settings, seeds: Sequence[int]) -> None:
        self._low_rank = LowRank.of(config)
        self._scale = GaLore.scale if config.galore_scale is None else config.galore_scale
        self._small: dict[Tensor, nn.Parameter] = {}
        self._decay: dict[Tensor, float] = {}
        self._projections: dict[Tensor, Projection] = {}
        super().__init__(config, settings, seeds)

    def _make(self, settings: Settings) -> Any:
        for group in settings:
            for matrix in group["params"]:
                self._small[matrix] = nn.Parameter(matrix.new_empty(0, 0))
                self._decay[matrix] = group["weight_decay"]
        small = [
            {**group, "params": [self._small[each] for each in group["params"]], "weight_decay": 0.0}
            for group in settings
        ]
        return super()._make(small)

    def step(self) -> None:
        """One update of the matrices that have a gradient."""
        learning = [matrix for matrix in self._small if matrix.grad is not None]
        for matrix in learning:
            assert matrix.grad is not None
            projection, small = self._projection(matrix), self._small[matrix]
            done = self.optimizer.state.get(small, {}).get("step", 0)
            projection.renew(matrix.grad, done, self.config.galore_cos_threshold, self.config.galore_gamma_proj)
            gradient = projection.project(matrix.grad).contiguous()
            small.data, small.grad = torch.zeros_like(gradient), gradient
        super().step()
        rates = {small: group["lr"] for group in self.optimizer.param_groups for small in group["params"]}
        for matrix in learning:
            small = self._small[matrix]
            matrix.data.add_(self._projections[matrix].back(small.data), alpha=self._scale)
            matrix.data.add_(matrix.data, alpha=-rates[small] * self._decay[matrix])
            small.grad, small.data = None, small.data.new_empty(0, 0)

    def _projection(self, matrix: Tensor) -> Projection:
        if matrix not in self._projections:
            self._projections[matrix] = Projection(self._low_rank, self.config.galore_update_proj_gap)
        return self._projections[matrix]

    def tensors(self, parameter: Tensor) -> dict[str, Tensor]:
        """Moments and projection of a matrix; {} before its first step."""
        found = super().tensors(self._small[parameter])
        return {**found, **self._projections[parameter].tensors()} if found else {}

    def restore(self, parameter: Tensor, tensors: Mapping[str, Tensor], step: int) -> None:
        """Put back what `tensors` gave after `step` updates."""
        moments = {key: tensor for key, tensor in tensors.items() if key in self.keys}
        super().restore(self._small[parameter], moments, step)
        self._projection(parameter).restore(tensors)
