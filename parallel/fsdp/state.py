"""Optimizer state of a transformers model on this rank, with the weights it belongs to, as boxes of global tensors."""

from collections.abc import Iterator, Sequence

import torch

from mswift.converters.layout import Region
from mswift.parallel.engine import DTYPES, Read, StateShard, bytes_of
from mswift.parallel.fsdp.config import HfSettings
from mswift.parallel.fsdp.optimizer import ShardedOptimizer
from mswift.parallel.fsdp.pieces import read_rows, shards
from mswift.parallel.fsdp.sampled import SampledLayers
from mswift.parallel.fsdp.weights import RankWeights


class RankState:
    """What a run goes on with.

    rank, copy: as in `RankWeights`; sampled: which layers have state now, where LISA chooses.
    """

    def __init__(
        self,
        weights: RankWeights,
        optimizer: ShardedOptimizer,
        config: HfSettings,
        rank: int,
        copy: int,
        sampled: SampledLayers | None,
    ) -> None:
        self._weights, self._optimizer, self._config, self._sampled = weights, optimizer, config, sampled
        self._rank, self._copy = rank, copy
        self._tuned = weights.tuned

    @torch.no_grad()
    def load(self, read: Read, optimizer_step: int) -> None:
        """Weights (adapters only in an adapter run) and optimizer state, as they were after `optimizer_step` updates.

        `read` is asked for exactly the regions of this rank.
        """
        dtype, tuned = DTYPES[self._config.dtype], self._tuned
        if not self._config.trains_adapter:
            self._weights.read_buffers(read, lambda _: torch.float32)
        if tuned.method is not None:
            tuned.method.load(read)
            tuned.method.load_state(read)
        for name, mapped in tuned.trained.items():
            rows, shard = self._weights.rows(name), self._optimizer.shard(name)
            if not rows.sizes[0]:
                continue
            if self._config.dtype == "F32":
                read_rows(mapped, rows, shard, read)
            else:  # the weights are what the masters are rounded to; both are asked for, as a strict reader wants
                read_rows(mapped, rows, torch.empty(rows.sizes, dtype=dtype), read)
                read_rows(tuned.state_of[name], rows, shard, read, "optimizer.master.")
            seen = optimizer_step if self._sampled is None else self._sampled.updates_of(name, optimizer_step)
            if seen:
                self._optimizer.make_states(name, seen)
                for key, values in self._optimizer.states(name):
                    read_rows(tuned.state_of[name], rows, values, read, f"optimizer.{key}.")
        frozen = {name: mapped for name, mapped in tuned.saved.items() if name not in tuned.trained}
        self._weights.read(frozen, read, lambda _: dtype)
        if optimizer_step:
            self._load_whole(read, optimizer_step)

    def _load_whole(self, read: Read, optimizer_step: int) -> None:
        """State of rules that need whole matrices, by the parameters whose state this rank keeps."""
        for rule in self._optimizer.whole:
            for name in rule.owned:
                tensors = rule.empty_states(name)
                for key, tensor in tensors.items():
                    found = torch.empty(tensor.shape, dtype=tensor.dtype)
                    read(self._whole_key(name, key), Region.full(_at_least_1d(tensor.shape)), bytes_of(found))
                    tensor.copy_(found)
                rule.restore(name, tensors, optimizer_step)

    def _whole_key(self, name: str, state: str) -> str:
        return f"optimizer.{state}.of.{self._tuned.trained[name].name}"

    def shards(self) -> Iterator[StateShard]:
        """fp32 optimizer state, laid out like its parameter: `optimizer.<state>.<key>`; also fp32 masters of BF16.

        What a rule of whole matrices keeps is as it has it: `optimizer.<state>.of.<transformers' name>`.
        """
        for name, mapped, rows in self._weights.answered(self._tuned.state_of):
            if self._config.dtype != "F32":
                yield from shards(mapped, rows, self._optimizer.shard(name), "optimizer.master.")
            for key, values in self._optimizer.states(name):
                yield from shards(mapped, rows, values, f"optimizer.{key}.")
        for rule in self._optimizer.whole if self._copy == 0 else ():
            for name in rule.owned:
                for key, values in rule.states(name):
                    shape = _at_least_1d(values.shape)
                    yield StateShard(self._whole_key(name, key), shape, Region.full(shape), values.contiguous())
        if self._tuned.method is not None and self._rank == 0:
            yield from self._tuned.method.state_shards()

    def gradients(self) -> Iterator[StateShard]:
        """fp32 gradients of the newest step, as clipped: `gradient.<key>`, each element on one rank."""
        for name, mapped, rows in self._weights.answered(self._tuned.trained):
            gradient = self._optimizer.shard(name).grad
            if gradient is not None:
                yield from shards(mapped, rows, gradient, "gradient.")


def _at_least_1d(shape: Sequence[int]) -> tuple[int, ...]:
    """A number is saved as a tensor of one element."""
    return tuple(shape) or (1,)
