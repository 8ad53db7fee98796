"""The libraries behind update rules of whole matrices: made for some parameters, their state as plain tensors and back.

`Parameters` are stand-ins, which hold a matrix and its gradient during a step only.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mswift.parallel.fsdp.config import HfSettings

Settings = list[dict[str, Any]]


class Library(ABC):
    """One update rule. seeds: of each stand-in, in the order of the settings; the same at any layout."""

    keys: tuple[str, ...] = ()

    def __init__(self, config: HfSettings, settings: Settings, seeds: Sequence[int]) -> None:
        self.config, self._seeds = config, seeds
        self.optimizer = self._make(settings)

    @abstractmethod
    def _make(self, settings: Settings) -> Any: ...

    def tensors(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a stand-in; {} before its first step."""
        state = self.optimizer.state.get(parameter, {})
        return {key: state[key] for key in self.keys if key in state}

    def restore(self, parameter: Tensor, tensors: Mapping[str, Tensor], step: int) -> None:
        """Put back what `tensors` gave after `step` updates."""
        self.optimizer.state[parameter] = {**tensors, **self._beside(parameter, tensors, step)}

    def _beside(self, parameter: Tensor, tensors: Mapping[str, Tensor], step: int) -> dict[str, Any]:
        """What else the library keeps."""
        return {"step": step}

    def step(self) -> None:
        """One update of the stand-ins that have a gradient."""
        self.optimizer.step()

    def _betas(self) -> tuple[float, float]:
        return self.config.adam_beta1, self.config.adam_beta2


class Adafactor(Library):
    """torch's: Shazeer & Stern 2018 (arXiv 1804.04235); the learning rate is relative to the weights' magnitude."""

    keys = ("row_var", "col_var", "variance")

    def _make(self, settings: Settings) -> Any:
        return torch.optim.Adafactor(settings, lr=self.config.lr, foreach=False)

    def _beside(self, parameter: Tensor, tensors: Mapping[str, Tensor], step: int) -> dict[str, Any]:
        return {"step": torch.tensor(float(step))}


class Muon(Library):
    """torch's, with the learning rate scaled as by Liu et al. 2025 (arXiv 2502.16982), so that adam's serves both."""

    keys = ("momentum_buffer",)

    def _make(self, settings: Settings) -> Any:
        return torch.optim.Muon(
            settings, lr=self.config.lr, momentum=self.config.muon_momentum, adjust_lr_fn="match_rms_adamw"
        )

    def _beside(self, parameter: Tensor, tensors: Mapping[str, Tensor], step: int) -> dict[str, Any]:
        return {}


class AdamW8bit(Library):
    """bitsandbytes': moments in 8 bits, 256 of them with one scale (Dettmers et al. 2021, arXiv 2110.02861)."""

    keys = ("state1", "state2", "absmax1", "absmax2")

    def _make(self, settings: Settings) -> Any:
        from bitsandbytes.optim import AdamW8bit as Bitsandbytes

        return Bitsandbytes(settings, lr=self.config.lr, betas=self._betas(), eps=self.config.adam_eps)

    def _beside(self, parameter: Tensor, tensors: Mapping[str, Tensor], step: int) -> dict[str, Any]:
        if "absmax1" not in tensors:
            return {"step": step}
        maps, device = self.optimizer.name2qmap, tensors["absmax1"].device
        return {"step": step, "qmap1": maps["dynamic"].to(device), "qmap2": maps["udynamic"].to(device)}


class GaLore(Library):
    """galore-torch's AdamW: Zhao et al. 2024 (arXiv 2403.03507), moments of the gradient's leading directions."""

    keys: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    scale = 0.25

    def _make(self, settings: Settings) -> Any:
        from galore_torch import GaLoreAdamW

        for group in settings:
            group.update(self._low_rank())
        return GaLoreAdamW(
            settings, lr=self.config.lr, betas=self._betas(), eps=self.config.adam_eps, no_deprecation_warning=True
        )

    def _low_rank(self) -> dict[str, Any]:
        config = self.config
        scale = self.scale if config.galore_scale is None else config.galore_scale
        gap = config.galore_update_proj_gap
        return {"rank": config.galore_rank, "update_proj_gap": gap, "scale": scale, "proj_type": "std"}

    def step(self) -> None:
        """A projection is kept as it would be read back: a product depends on how its factors lie in memory."""
        super().step()
        for state in self.optimizer.state.values():
            if "projector" in state:
                state["projector"].ortho_matrix = state["projector"].ortho_matrix.contiguous()

    def tensors(self, parameter: Tensor) -> dict[str, Tensor]:
        """As above, with the projection."""
        found = super().tensors(parameter)
        return {**found, "ortho_matrix": self.optimizer.state[parameter]["projector"].ortho_matrix} if found else {}

    def _beside(self, parameter: Tensor, tensors: Mapping[str, Tensor], step: int) -> dict[str, Any]:
        projector = self._projector(parameter, step)
        projector.ortho_matrix = tensors["ortho_matrix"]
        return {"step": step, "projector": projector}

    def _projector(self, parameter: Tensor, step: int) -> Any:
        from galore_torch.galore_projector import GaLoreProjector

        return GaLoreProjector(**self._low_rank())


class Apollo(GaLore):
    """apollo-torch's AdamW: Zhu et al. 2024 (arXiv 2412.05270), a scale for each channel from a random projection."""

    keys = ("exp_avg", "exp_avg_sq", "scaled_grad")
    scale = 1.0

    def _make(self, settings: Settings) -> Any:
        from apollo_torch import APOLLOAdamW

        for group in settings:
            group.update(self._low_rank(), proj="random", scale_type="channel")
        made = APOLLOAdamW(settings, lr=self.config.lr, betas=self._betas(), eps=self.config.adam_eps)
        stand_ins = [each for group in made.param_groups for each in group["params"]]
        self._seed_of = dict(zip(stand_ins, self._seeds, strict=True))
        for parameter, seed in self._seed_of.items():
            made.state[parameter]["seed"] = seed
        return made

    def _beside(self, parameter: Tensor, tensors: Mapping[str, Tensor], step: int) -> dict[str, Any]:
        return {"seed": self._seed_of[parameter], **super()._beside(parameter, tensors, step)}

    def _projector(self, parameter: Tensor, step: int) -> Any:
        from apollo_torch.random_projector import GradientProjector, next_seed

        seed = self._seed_of[parameter]
        for _ in range((step - 1) // self.config.galore_update_proj_gap + 1):
            seed = next_seed(seed)
        return GradientProjector(**self._low_rank(), seed=seed)
