"""What a rank has of the weights under ZeRO: boxes of fragments. Masters of what is trained, values of the rest."""

from collections.abc import Callable

import torch
from torch import Tensor

from mswift.converters.plan import ModelTable
from mswift.converters.reader import WeightReader
from mswift.parallel.deepspeed.fragments import flat_boxes
from mswift.parallel.deepspeed.zero import ZeroModel
from mswift.parallel.engine import AdapterSource, Read
from mswift.parallel.fsdp.config import HfSettings
from mswift.parallel.fsdp.pieces import Box
from mswift.parallel.fsdp.tuned import TunedModel
from mswift.parallel.fsdp.weights import RankWeights


class ZeroWeights(RankWeights):
    """Whatever fills them is published to all ranks."""

    def __init__(self, tuned: TunedModel, table: ModelTable, config: HfSettings, rank: int, zero: ZeroModel) -> None:
        super().__init__(tuned, table, config, rank, 0)
        self._zero = zero
        mapped = {**tuned.base, **tuned.saved}
        self._shapes = {name: each.shape for name, each in mapped.items()}

    def boxes(self, name: str) -> list[Box]:
        """Of its fragment."""
        fragment = self._zero.fragment(name)
        if fragment is None:
            return []
        return [Box(region, at) for region, at in flat_boxes(self._shapes[name], fragment.start, fragment.count)]

    def values(self, name: str) -> Tensor:
        """[elements]."""
        fragment = self._zero.fragment(name)
        assert fragment is not None
        return fragment.values

    def answers(self, name: str) -> bool:
        """For its fragment; what every rank has in whole is the first one's."""
        return self._rank == 0 or self._zero.is_cut(name)

    def _weight_rows(self, name: str, first: int, count: int) -> Tensor:
        return self.parameters[name].data[first : first + count]

    def load(self, reader: WeightReader, *, resumed: bool) -> None:
        """As its parent."""
        super().load(reader, resumed=resumed)
        self._zero.publish()

    def _start_lora(self) -> None:
        """A start that is a part of the weight is made of whole weights, which are there before it."""
        lora = self._config.lora
        if lora is None or lora.settings.init == "true":
            return super()._start_lora()
        self._zero.publish()
        super()._start_lora()
        for name in self.tuned.trained:
            fragment = self._zero.fragment(name)
            if fragment is not None:
                whole = self.parameters[name].data.view(-1)
                fragment.values.copy_(whole[fragment.start : fragment.start + fragment.count])

    def load_adapter(self, source: AdapterSource) -> None:
        """As its parent."""
        super().load_adapter(source)
        self._zero.publish()

    def load_trained(self, read: Read, stored: Callable[[str], torch.dtype]) -> None:
        """As its parent."""
        super().load_trained(read, stored)
        self._zero.publish()
