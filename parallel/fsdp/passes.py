"""Forward and backward passes of a transformers model over this rank's rows, and their sums over the job.

Shapes: b microbatch size, s padded sequence length, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mswift.parallel import dropout, sequence
from mswift.parallel.batch import Microbatch, RankBatch, rank_batches, whole_rows
from mswift.parallel.engine import LossPart
from mswift.parallel.fsdp.config import HfSettings
from mswift.parallel.fsdp.methods import MethodAdapters
from mswift.topology import ParallelDims


@dataclass(frozen=True)
class Passed:
    """A step's passes over the global batch; fields as in `mswift.parallel.engine.StepResult`."""

    loss: float
    num_tokens: int
    weight_sum: float
    channels: tuple[LossPart, ...]


class Passes:
    """What an engine computes with its model; called, `model` answers as `mswift.parallel.fsdp.model.TrainedModel`.

    context: the ranks that share sequences with this one, None where it has them alone. method: the adapter in the
    model, if it is no LoRA; drops: whether it has dropout.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        dims: ParallelDims,
        config: HfSettings,
        device: torch.device,
        context: dist.ProcessGroup | None,
        *,
        drops: bool,
        method: MethodAdapters | None = None,
    ) -> None:
        self._model, self._dims, self._config, self._device = model, dims, config, device
        self._coordinate = dims.coordinate(dist.get_rank())
        self._method = method
        self._context, self._counts_places = context, bool(config.neftune_alpha) or drops

    def train(
        self,
        microbatches: Sequence[Microbatch],
        num_channels: int,
        done: int | None,
        around: Callable[[bool], AbstractContextManager[None]],
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> Passed:
        """Forward and backward passes of a step after `done` updates; gradients are this rank's sums of its rows'.

        The loss is the mean over the global batch, weighted by the tokens' loss weights. around: of each microbatch's
        passes, told whether it is the last; backward: is given a microbatch's share of the loss. done None: no update
        is to follow, and embeddings get no noise; adapters must not have dropout then.
        """
        microbatches = self._extended(microbatches)
        batches = self._batches(microbatches)
        weight_sum = self.sum([_weight(batches)])[0]
        sums = torch.zeros(1 + num_channels, dtype=torch.float64, device=self._device)
        places: list[dropout.BatchPlace] = []
        if self._counts_places and done is not None:
            places = dropout.places(microbatches, batches, self._dims, self._coordinate, self._config.seed, done)
        for number, batch in enumerate(batches):
            where = dropout.at(places[number] if places else None)
            with where, around(number == len(batches) - 1):
                found = self.forward(batch, num_channels)
                backward(found[0] / weight_sum if weight_sum else found[0] * float("nan"))
            sums += found.detach().double()
        count = sum(int(torch.count_nonzero(batch.loss_weights)) for batch in batches)
        totals, channels = self._totals([float(sums[0]), count], sums[1:].tolist(), batches)
        loss = totals[0] / weight_sum if weight_sum else float("nan")
        return Passed(loss, int(totals[1]), weight_sum, channels)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch], num_channels: int) -> tuple[LossPart, tuple[LossPart, ...]]:
        """Loss over the global batch, and the parts of it by channel."""
        batches = self._batches(self._extended(microbatches))
        sums = torch.zeros(1 + num_channels, dtype=torch.float64, device=self._device)
        for batch in batches:
            sums += self.forward(batch, num_channels).double()
        totals, channels = self._totals([float(sums[0]), _weight(batches)], sums[1:].tolist(), batches)
        return LossPart(*totals), channels

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [b, s] of this data-parallel rank -> logits [b, s, V] in the model's dtype."""
        batch = self._batches(self._extended([Microbatch(tokens, tokens, torch.zeros_like(tokens))]))[0]
        mine = self._model(batch.tokens.to(self._device), self._positions(batch))
        parts = [mine]
        if self._dims.cp > 1:
            parts = [torch.empty_like(mine) for _ in range(self._dims.cp)]
            dist.all_gather(parts, mine.contiguous(), group=self._context)
        first = 0 if self._method is None else self._method.num_virtual_tokens
        return whole_rows(parts, first + tokens.shape[1])[:, first:]

    def forward(self, batch: RankBatch, num_channels: int) -> Tensor:
        """[1 + channels], sums over the rows of this rank."""
        channels = None
        if num_channels:
            assert batch.channels is not None
            channels = batch.channels.to(self._device)
        tensors = (batch.labels.to(self._device), batch.loss_weights.to(self._device))
        return self._model(batch.tokens.to(self._device), self._positions(batch), *tensors, channels, num_channels)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Over all ranks: each holds positions of its own."""
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return total.tolist()  # type: ignore[no-any-return]

    def all_finite(self, *values: float) -> bool:
        """Whether they are on every rank."""
        finite = torch.tensor(all(map(math.isfinite, values)), dtype=torch.int32, device=self._device)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)

    def _extended(self, microbatches: Sequence[Microbatch]) -> Sequence[Microbatch]:
        """With what the adapter puts before sequences."""
        return microbatches if self._method is None else [self._method.extended(batch) for batch in microbatches]

    def _batches(self, microbatches: Sequence[Microbatch]) -> list[RankBatch]:
        return rank_batches(microbatches, self._dims, self._coordinate.cp)

    def _positions(self, batch: RankBatch) -> Tensor:
        shifted = self._config.shifted_attention and torch.is_grad_enabled()
        sequence.attending(batch.documents, shifted=shifted)
        return sequence.document_positions(batch.documents, batch.seq_length, self._coordinate.cp, self._device)

    def _totals(
        self, values: Sequence[float], by_channel: Sequence[float], batches: Sequence[RankBatch]
    ) -> tuple[list[float], tuple[LossPart, ...]]:
        """Sums over the global batch, of values and of losses by channel, these with their weights."""
        num_channels = len(by_channel)
        weights = torch.zeros(num_channels, dtype=torch.float64)
        for batch in batches if num_channels else ():
            assert batch.channels is not None
            flat = batch.loss_weights.flatten().double().cpu()
            weights += torch.bincount(batch.channels.flatten().cpu(), flat, minlength=num_channels)
        found = self.sum([*values, *by_channel, *weights.tolist()])
        apart = found[len(values) :]
        return found[: len(values)], tuple(map(LossPart, apart[:num_channels], apart[num_channels:]))


def _weight(batches: Sequence[RankBatch]) -> float:
    return sum(float(batch.loss_weights.sum(dtype=torch.float64)) for batch in batches)
