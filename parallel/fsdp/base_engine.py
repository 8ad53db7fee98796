"""What the engines of transformers models share, however the model is cut over the ranks."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from mswift.converters.plan import ModelTable
from mswift.converters.reader import WeightReader
from mswift.parallel.batch import Microbatch
from mswift.parallel.engine import AdapterSource, LossPart, Read, StateShard
from mswift.parallel.fsdp.passes import Passes
from mswift.parallel.fsdp.state import RankState
from mswift.parallel.fsdp.tuned import TunedModel
from mswift.parallel.fsdp.weights import RankWeights


class BaseEngine:
    """One rank's part of a transformers model; the engine that inherits it makes these parts."""

    table: ModelTable
    _tuned: TunedModel
    _weights: RankWeights
    _state: RankState
    _passes: Passes

    def load_weights(self, reader: WeightReader, *, resumed: bool = False) -> None:
        """Fill the base from a checkpoint: what this rank has of it. Adapters get their start (not if resumed).

        Raises CheckpointError for another model than the engine's.
        """
        self._weights.load(reader, resumed=resumed)

    def load_adapter(self, source: AdapterSource) -> None:
        """Fill the adapters from a PEFT directory (`mswift.tuners.adapter.PeftAdapter`, `OtherAdapter`)."""
        self._weights.load_adapter(source)

    def load_trained(self, read: Read, stored: Callable[[str], torch.dtype]) -> None:
        """What is trained (of an adapter run: the adapters) and nothing else; `stored`: dtype that `read` delivers."""
        self._weights.load_trained(read, stored)

    def model_shards(self) -> Iterator[StateShard]:
        """What a checkpoint must hold of the weights, as `RankWeights.shards`."""
        yield from self._weights.shards()

    def optimizer_shards(self) -> Iterator[StateShard]:
        """Optimizer state and fp32 masters, as `RankState.shards`."""
        yield from self._state.shards()

    def evaluate(
        self, microbatches: Sequence[Microbatch], num_channels: int = 0
    ) -> tuple[LossPart, tuple[LossPart, ...]]:
        """Loss over the global batch, and the parts of it by channel; touches no state of the training."""
        return self._passes.evaluate(microbatches, num_channels)

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [b, s] of this data-parallel rank -> logits [b, s, V] in the model's dtype."""
        return self._passes.logits(tokens)

    @cached_property
    def num_parameters(self) -> int:
        """Elements of the global model, adapters not counted, tied embeddings once."""
        return sum(prod(tensor.shape) for tensor in self.table.megatron.values())

    @property
    def trainable_parameters(self) -> int:
        """Elements that the whole job trains."""
        return sum(prod(mapped.shape) for mapped in self._tuned.trained.values())
