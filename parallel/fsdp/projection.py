"""The projection of a gradient to its leading directions, in few bits, found anew ever less often.

Zhang et al. 2024 (arXiv 2407.08296), section 3. Shapes: m, n of a matrix; r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from mswift.config.optimizers import LowRank

_FEW = 1e-12  # of a group that is all zeros: its scale, so that nothing is divided by zero
_NONE = -1.0  # in a saved queue: no similarity yet; |cosines| are none of these


@dataclass(frozen=True)
class Codes:
    """A tensor in `bits` bits an element: (code - zero) * scale, with one scale and zero point for each group.

    codes: uint8, two of four bits in each, the first in the lower half; scale fp32, zero uint8: [groups].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, values: Tensor, bits: int, group: int) -> "Codes":
        """The nearest codes: none is further off than half its group's scale.

        group: elements, an even number; their range is widened to hold 0, so that zero points fit.
        """
        count = values.numel()
        padded = values.new_zeros(-(-count // group) * group)
        padded[:count] = values.flatten()
        groups, highest = padded.view(-1, group), 2**bits - 1
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        scale = ((high - low) / highest).clamp(min=_FEW)
        zero = (-low / scale).round()
        codes = ((groups / scale[:, None]).round() + zero[:, None]).clamp(0, highest).to(torch.uint8).flatten()
        if bits == 4:
            codes = codes[::2] | codes[1::2] << 4
        return cls(codes, scale, zero.to(torch.uint8))

    def values(self, shape: tuple[int, ...], bits: int) -> Tensor:
        """[shape], fp32."""
        codes = self.codes
        if bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], 1).flatten()
        by_group = codes.view(len(self.scale), -1).float()
        values = (by_group - self.zero.float()[:, None]) * self.scale[:, None]
        return values.flatten()[: prod(shape)].view(shape)


@dataclass
class Projection:
    """That of a matrix [m, n]: [r, n] from the right where m >= n, else [m, r] from the left; none before `renew`.

    gap: updates between two searches; similarities: the newest |cosines| of a first direction and the one before.
    """

    low_rank: LowRank
    gap: int
    similarities: list[float] = field(default_factory=list)
    _kept: Tensor | Codes | None = None
    _shape: tuple[int, ...] = ()

    @property
    def from_right(self) -> bool:
        """Whether rows are projected."""
        return self._shape[0] >= self._shape[1]

    @property
    def matrix(self) -> Tensor:
        """As it is multiplied with, fp32."""
        assert self._kept is not None
        if isinstance(self._kept, Tensor):
            return self._kept
        (m, n), rank = self._shape, self.low_rank.rank
        return self._kept.values((rank, n) if self.from_right else (m, rank), self.low_rank.bits)

    def renew(self, gradient: Tensor, step: int, threshold: float, factor: int) -> None:
        """To be called with each gradient [m, n], after `step` updates: finds it anew where it is time.

        The gap is multiplied by `factor` from a full queue of similarities on whose mean is `threshold` or more.
        """
        self._shape = tuple(gradient.shape)
        if self._kept is not None and step % self.gap:
            return
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        rank = self.low_rank.rank
        found = (right[:rank] if self.from_right else left[:, :rank]).contiguous()
        if self._kept is not None:
            before, now = (each[0] if self.from_right else each[:, 0] for each in (self.matrix, found))
            # a direction has no sign
            cosine = float(torch.nn.functional.cosine_similarity(before, now, dim=0).abs())
            queue = self.low_rank.queue
            self.similarities = [*self.similarities, cosine][-queue:]
            if len(self.similarities) == queue and sum(self.similarities) / queue >= threshold:
                self.gap *= factor
        bits = self.low_rank.bits
        self._kept = found if bits == 32 else Codes.of(found, bits, self.low_rank.group)

    def project(self, gradient: Tensor) -> Tensor:
        """[m, n] -> [m, r], or [r, n]."""
        return gradient @ self.matrix.t() if self.from_right else self.matrix.t() @ gradient

    def back(self, small: Tensor) -> Tensor:
        """[m, r] or [r, n] -> [m, n]."""
        return small @ self.matrix if self.from_right else self.matrix @ small

    # -- saved

    def tensors(self) -> dict[str, Tensor]:
        """As `mswift.config.optimizers.state_of` names them."""
        assert self._kept is not None
        queue = self.similarities + [_NONE] * (self.low_rank.queue - len(self.similarities))
        renewal = {"renewal": torch.tensor([float(self.gap), *queue])}
        if isinstance(self._kept, Tensor):
            return {"ortho_matrix": self._kept} | renewal
        return {
            "ortho_codes": self._kept.codes,
            "ortho_scale": self._kept.scale,
            "ortho_zero": self._kept.zero,
        } | renewal

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """As `tensors` gave it."""
        gap, *queue = tensors["renewal"].tolist()
        self.gap, self.similarities = int(gap), [each for each in queue if each != _NONE]
        if "ortho_matrix" in tensors:
            self._kept = tensors["ortho_matrix"]
        else:
            self._kept = Codes(*(tensors[f"ortho_{part}"] for part in ("codes", "scale", "zero")))
