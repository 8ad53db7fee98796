"""LoRA that starts from data, by PEFT's own code: EVA from what linears are given, LoRA-GA from their gradients.

    eva      A are the directions in which a linear's inputs vary most, B is zero
             (Paischer et al. 2024, arXiv 2410.07170)
    lora_ga  A and B are singular vectors of the gradient of a linear's weight, which is without their product
             (Wang et al. 2024, arXiv 2407.05000)

Shapes: o, i features of a linear, r rank, n tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mswift.tuners.inject import NAME
from mswift.tuners.lora import Adapted


@dataclass(frozen=True)
class DataStart:
    """tau: cosine between two estimates of a direction from which on EVA takes it for found; the rest is LoRA-GA's."""

    kind: str
    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16
    tau: float = 0.99


class Directions:
    """EVA's A [r, i] of one linear, batch by batch: PEFT's incremental principal components."""

    def __init__(self, rank: int, tau: float) -> None:
        from peft.utils.incremental_pca import IncrementalPCA

        self._pca: Any = IncrementalPCA(n_components=rank, copy=True, lowrank=True, lowrank_seed=42)
        self._rank, self._tau = rank, tau
        self.found = False

    def add(self, inputs: Tensor) -> None:
        """inputs [n, i] fp32; fewer than 2 r are passed over, as they have no r directions that could be told."""
        if len(inputs) < 2 * self._rank:
            return
        before = getattr(self._pca, "components_", None)
        self._pca.partial_fit(inputs)
        if before is not None:
            closeness = torch.nn.functional.cosine_similarity(self._pca.components_, before)
            self.found = bool((closeness >= self._tau).all())

    @property
    def matrix(self) -> Tensor:
        """A [r, i]."""
        made: Tensor = self._pca.components_
        return made


def gradient_factors(
    weight: Tensor, gradient: Tensor, adapted: Adapted, how: DataStart, seed: int
) -> tuple[Tensor, Tensor]:
    """LoRA-GA's A [r, i] and B [o, r] in the dtype of `weight` [o, i]; gradient [o, i] fp32, its mean over batches.

    seed: of the randomised decomposition.
    """
    from peft import LoraConfig, LoraGAConfig, inject_adapter_in_model

    holder: Any = nn.Module()
    holder.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    holder.linear._peft_loraga_grad = gradient
    own: dict[str, Any] = {"direction": how.direction, "scale": how.scale, "stable_gamma": how.stable_gamma}
    fields: dict[str, Any] = {
        "r": adapted.rank,
        "lora_alpha": adapted.scale * adapted.rank,
        "target_modules": ["linear"],
        "init_lora_weights": "lora_ga",
        "lora_ga_config": LoraGAConfig(**own),
    }
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(**fields), holder, adapter_name=NAME)
    return holder.linear.lora_A[NAME].weight.detach(), holder.linear.lora_B[NAME].weight.detach()
