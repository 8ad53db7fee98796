"""AdaLoRA's two rules beside the loss (arXiv 2303.10512), by PEFT's own code, with a state that checkpoints hold.

A and B stay near orthonormal: `orth_reg_weight` times the mean of |A A^T - I| and |B^T B - I| (Frobenius) is minimised
as well, once a step. After an update singular values of little importance become zero until the step's budget is met.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mswift.converters.layout import Region
from mswift.parallel.engine import Read, StateShard, bytes_of
from mswift.parallel.mapped import Mapped, shards, whole
from mswift.tuners.inject import NAME

_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")  # as PEFT's RankAllocator names them
_STATE = "optimizer."
_MASK = "rank_mask"


class RankBudget:
    """tuner: PEFT's AdaLoraModel; every rank has all of the adapter, and does the same."""

    def __init__(self, tuner: Any, saved: Mapping[str, Mapped]) -> None:
        self._tuner, self._saved = tuner, saved

    @property
    def _config(self) -> Any:
        return self._tuner.peft_config[NAME]

    def _parameters(self) -> Iterator[tuple[str, Mapped, Tensor]]:
        parameters = dict(self._tuner.model.named_parameters())
        for name, mapped in self._saved.items():
            if ".lora_" in name:
                yield name, mapped, parameters[name]

    def regularise(self) -> None:
        """Add the gradient of the regularisation to the gradients."""
        parts = []
        for name, _, p in self._parameters():
            if ".lora_E." not in name:
                square = p @ p.T if ".lora_A." in name else p.T @ p
                parts.append(torch.linalg.matrix_norm(square - torch.eye(len(square), device=p.device)))
        with torch.enable_grad():
            (self._config.orth_reg_weight * torch.stack(parts).mean()).backward()  # type: ignore[no-untyped-call]

    def after_update(self, step: int) -> None:
        """Importances of all elements, and which singular values remain; the gradients are there yet."""
        self._tuner.update_and_allocate(step)

    def _kept(self, name: str, p: Tensor) -> Tensor:
        """[rank, 1]: 1 for the singular values that remain."""
        pattern = self._config.rank_pattern
        return torch.ones(p.shape) if pattern is None else torch.tensor(pattern[name]).float().view(p.shape)

    def shards(self) -> Iterator[StateShard]:
        """Importances like their parameters, and the masks of singular values, fp32."""
        allocator = self._tuner.rankallocator
        for name, mapped, p in self._parameters():
            values = {kind: getattr(allocator, kind).get(name, torch.zeros_like(p)) for kind in _AVERAGES}
            if ".lora_E." in name:
                values[_MASK] = self._kept(name, p)
            for kind, value in values.items():
                own = whole(mapped.name, mapped.key, mapped.shape)
                yield from shards(own, Region.full(mapped.shape), value.float().cpu(), f"{_STATE}{kind}.")

    def load(self, read: Read) -> None:
        """As `shards` wrote it."""
        allocator, masks = self._tuner.rankallocator, {}
        for name, mapped, p in self._parameters():
            kinds = (*_AVERAGES, _MASK) if ".lora_E." in name else _AVERAGES
            for kind in kinds:
                value = torch.empty(mapped.shape)
                read(f"{_STATE}{kind}.{mapped.key}", Region.full(mapped.shape), bytes_of(value))
                if kind == _MASK:
                    masks[name] = value.bool().view(-1).tolist()
                else:
                    getattr(allocator, kind)[name] = value.to(p.device)
                    allocator.ipt[name] = torch.zeros_like(p)
        self._config.rank_pattern = masks
