"""Optimizer state of a transformers model on this rank, with the weights it belongs to, as boxes of global tensors."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mswift.converters.layout import Region
from mswift.parallel.engine import DTYPES, Read, StateShard, bytes_of
from mswift.parallel.fsdp.config import HfSettings
from mswift.parallel.fsdp.sampled import SampledLayers
from mswift.parallel.fsdp.weights import RankWeights
from mswift.parallel.fsdp.whole import WholeRule
from mswift.parallel.mapped import read_rows, shards


class Updates(Protocol):
    """What a rank updates of the trained parameters, and what it keeps for that (`ShardedOptimizer`)."""

    @property
    def whole(self) -> Sequence[WholeRule]: ...
    def shard(self, name: str) -> Tensor: ...
    def states(self, name: str) -> Iterator[tuple[str, Tensor]]: ...
    def make_states(self, name: str, step: int) -> None: ...


class RankState:
    """What a run goes on with.

    rank, copy: as in `RankWeights`; sampled: which layers have state now, where LISA chooses.
    """

    def __init__(
        self,
        weights: RankWeights,
        optimizer: Updates,
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
            boxes = self._weights.boxes(name)
            if not boxes:
                continue
            seen = optimizer_step if self._sampled is None else self._sampled.updates_of(name, optimizer_step)
            if seen:
                self._optimizer.make_states(name, seen)
            state = self._optimizer.states(name) if seen else ()
            kept = {f"optimizer.{key}.": values for key, values in state}
            if self._config.dtype != "F32":
                kept["optimizer.master."] = self._optimizer.shard(name)
            for box in boxes:
                # with masters the weights are what these are rounded to; a strict reader wants both to be asked for
                weights = self._optimizer.shard(name) if self._config.dtype == "F32" else None
                into = torch.empty(box.region.sizes, dtype=dtype) if weights is None else box.of(weights)
                read_rows(mapped, box.region, into, read)
                for prefix, values in kept.items():
                    read_rows(tuned.state_of[name], box.region, box.of(values), read, prefix)
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
        for name, mapped, box in self._weights.answered(self._tuned.state_of):
            if self._config.dtype != "F32":
                yield from shards(mapped, box.region, box.of(self._optimizer.shard(name)), "optimizer.master.")
            for key, values in self._optimizer.states(name):
                yield from shards(mapped, box.region, box.of(values), f"optimizer.{key}.")
        for rule in self._optimizer.whole if self._copy == 0 else ():
            for name in rule.owned:
                for key, values in rule.states(name):
                    shape = _at_least_1d(values.shape)
                    yield StateShard(self._whole_key(name, key), shape, Region.full(shape), values.contiguous())
        if self._tuned.method is not None and self._rank == 0:
            yield from self._tuned.method.state_shards()

    def gradients(self) -> Iterator[StateShard]:
        """fp32 gradients of the newest step, as clipped: `gradient.<key>`, each element on one rank."""
        for name, mapped, box in self._weights.answered(self._tuned.trained):
            gradient = self._optimizer.shard(name).grad
            if gradient is not None:
                yield from shards(mapped, box.region, box.of(gradient), "gradient.")


def _at_least_1d(shape: Sequence[int]) -> tuple[int, ...]:
    """A number is saved as a tensor of one element."""
    return tuple(shape) or (1,)
