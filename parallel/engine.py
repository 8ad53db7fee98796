"""What a training engine is to the loop: steps, evaluation, and its state as boxes of named global tensors.

Names and shapes of the global tensors are those of the model's table (`mswift.converters.plan`), whichever engine holds
them: a checkpoint does not remember which one wrote it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from mswift.config.loss import LossFusion
from mswift.config.optimizers import OptimizerName
from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable
from mswift.converters.reader import WeightReader
from mswift.parallel.batch import Microbatch
from mswift.topology import ParallelDims
from mswift.tuners.lora import LoraConfig
from mswift.tuners.other_adapters import OtherConfig
from mswift.tuners.part import Part

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
"""What an engine computes in."""

SOURCE_DTYPES = {**DTYPES, "F16": torch.float16}
"""Dtypes that a checkpoint's weights may have; they are converted to the engine's."""

Read = Callable[[str, Region, memoryview], None]
"""Fill a buffer with the C-order bytes of a region of a named global tensor."""


@dataclass(frozen=True)
class StateShard:
    """A box of a global tensor; `tensor` holds its region.num_elements elements, contiguous, of any shape."""

    key: str
    shape: tuple[int, ...]
    region: Region
    tensor: Tensor


class LossPart(NamedTuple):
    """Sum of weighted losses and sum of weights over a part of the tokens."""

    loss_sum: float
    weight_sum: float

    @property
    def mean(self) -> float:
        """Their quotient; nan without weights."""
        return self.loss_sum / self.weight_sum if self.weight_sum else float("nan")

    def plus(self, other: "LossPart") -> "LossPart":
        """That of both parts together."""
        return LossPart(self.loss_sum + other.loss_sum, self.weight_sum + other.weight_sum)


@dataclass(frozen=True)
class StepResult:
    """One finished optimizer step. `seconds`: forward_backward (with gradient reduction) and optimizer.

    loss: over the global batch, the weighted sum divided by weight_sum, the sum of loss weights; num_tokens: how many
    tokens have one; grad_norm: global, before clipping; channels: the parts of either sum by channel.
    mtp_loss: of the multi-token-prediction layers where they are trained, the mean over them, divided by weight_sum as
    the loss is; what is minimised is loss + mtp_loss_scaling_factor * mtp_loss.
    updated: False where loss or grad_norm are not finite on some rank; weights and optimizer are then as before.
    """

    loss: float
    num_tokens: int
    weight_sum: float
    grad_norm: float
    updated: bool
    seconds: Mapping[str, float] = field(default_factory=dict)
    mtp_loss: float | None = None
    channels: tuple[LossPart, ...] = ()


class Held(NamedTuple):
    """Elements of some parameters on this rank, and bytes of their weights, gradients and optimizer state.

    State of the update rule is counted from the start, though the first update makes it.
    """

    elements: int
    weights: int
    gradients: int
    optimizer: int

    def __str__(self) -> str:
        if not self.elements:
            return "none"
        each = [f"{part / self.elements:.3g} {name}" for name, part in zip(self._fields[1:], self[1:], strict=True)]
        total = sum(self[1:]) / self.elements
        return f"{total:.3g} bytes each ({', '.join(each)})"


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine computes and updates; names as in `mswift.config` (loss_fusion: cross_entropy_loss_fusion).

    `trainable_modules` are HF modules (embed_tokens, lm_head) that are trained in full beside `lora`, or beside
    `method`, an adapter of another method (--backend fsdp, ddp). part: what of a full run is trained (None:
    everything). neftune_alpha: noise on the embeddings of training batches (Jain et al. 2023, arXiv 2310.05914).
    `clip_grad` 0 turns clipping off. BF16 keeps fp32 master weights and sums gradients in fp32. `lora_b_lr_ratio`:
    learning rate of B (and of magnitudes) over that of A. Collectives fail after `timeout_seconds`.
    """

    dtype: Literal["F32", "BF16"] = "F32"
    cp_comm_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    optimizer: OptimizerName = "adam"
    lr: float = 1e-5
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    sgd_momentum: float = 0.9
    clip_grad: float = 1.0
    seed: int = 42
    timeout_seconds: float = 1800.0
    loss_fusion: LossFusion = "auto"
    lora: LoraConfig | None = None
    method: OtherConfig | None = None
    trainable_modules: tuple[str, ...] = ()
    part: Part | None = None
    neftune_alpha: float = 0.0
    lora_b_lr_ratio: float = 1.0

    @property
    def trains_adapter(self) -> bool:
        """Whether the base stays as it is."""
        return self.lora is not None or self.method is not None


class AdapterSource(Protocol):
    """Where trained values come from: a PEFT directory (`mswift.tuners.adapter.PeftAdapter`)."""

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None: ...
    def read(self, name: str, region: Region) -> Tensor: ...


class Engine(Protocol):
    """One rank's part of a model that is trained."""

    table: ModelTable
    dims: ParallelDims
    optimizer_step: int

    @property
    def config(self) -> EngineSettings: ...

    def load_weights(self, reader: WeightReader, *, resumed: bool = False) -> None: ...
    def load_adapter(self, source: AdapterSource) -> None: ...
    def load_state(self, read: Read, optimizer_step: int) -> None: ...
    def load_trained(self, read: Read, stored: Callable[[str], torch.dtype]) -> None: ...
    def model_shards(self) -> Iterator[StateShard]: ...
    def optimizer_shards(self) -> Iterator[StateShard]: ...
    def train_step(self, microbatches: Sequence[Microbatch], lr: float, num_channels: int = 0) -> StepResult: ...
    def evaluate(
        self, microbatches: Sequence[Microbatch], num_channels: int = 0
    ) -> tuple[LossPart, tuple[LossPart, ...]]: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def trainable_parameters(self) -> int: ...
    def held_bytes(self) -> tuple[Held, Held]: ...
    def close(self) -> None: ...


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
