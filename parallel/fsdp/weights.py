"""A rank's rows of the weights of a transformers model, read and yielded as boxes of the table's global tensors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mswift.converters.adapters import expand_modules_to_save
from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable
from mswift.converters.reader import WeightReader
from mswift.errors import CheckpointError
from mswift.parallel.engine import DTYPES, SOURCE_DTYPES, AdapterSource, Read, StateShard
from mswift.parallel.four_bit import packed, passes
from mswift.parallel.fsdp.adapters import adapters_of, first_values
from mswift.parallel.fsdp.config import HfSettings
from mswift.parallel.fsdp.lora_start import MARK, from_weights, start_in_weights
from mswift.parallel.fsdp.pieces import Box, local, row_regions
from mswift.parallel.fsdp.tuned import TunedModel
from mswift.parallel.mapped import Mapped, read_rows, shards
from mswift.tuners.settings import FROM_DATA
from mswift.tuners.shapes import promised_shapes


class RankWeights:
    """The weights of `tuned` on this rank, which have their memory and their cut: rows of every parameter.

    rank: of the job; copy: number of its group among those that hold all rows, of which the first answers.
    Where ranks have something else than rows, `boxes`, `values` and `answers` say so.
    """

    def __init__(self, tuned: TunedModel, table: ModelTable, config: HfSettings, rank: int, copy: int) -> None:
        self.tuned, self._table, self._config, self._rank, self._copy = tuned, table, config, rank, copy
        self.parameters = tuned.parameters()
        self._buffers = tuned.kept_buffers()

    def boxes(self, name: str) -> list[Box]:
        """What this rank has of a parameter, in the order of `values`; nothing where it has none."""
        rows = self._rows(name)
        return [Box(rows)] if rows.sizes[0] else []

    def values(self, name: str) -> Tensor:
        """This rank's elements of a parameter, in memory; what is trained is fp32."""
        return local(self.parameters[name]).detach()

    def answers(self, name: str) -> bool:
        """Whether this rank, and no other, answers for what it has of a parameter."""
        return self._copy == 0 and (self._rank == 0 or isinstance(self.parameters[name], DTensor))

    def _weight_rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows of a matrix, of which this rank has the magnitudes."""
        return self.values(name)

    def _rows(self, name: str) -> Region:
        parameter = self.parameters[name]
        shape, four_bits = tuple(parameter.shape), packed(parameter)
        if four_bits is not None and four_bits.is_cut:
            return row_regions(shape, four_bits.first if four_bits.count else 0, four_bits.count)
        if not isinstance(parameter, DTensor):
            return Region.full(shape)
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, offsets = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        return row_regions(shape, offsets[0] if sizes[0] else 0, sizes[0])

    # -- read

    @torch.no_grad()
    def load(self, reader: WeightReader, *, resumed: bool) -> None:
        """Fill the base from a checkpoint: this rank's rows and no others. Adapters get their start (not if resumed).

        Raises CheckpointError for another model than the engine's.
        """
        if reader.table.spec != self._table.spec:
            raise CheckpointError(f"{reader.hf_files}: another model ({reader.table.spec}) than {self._table.spec}")
        self.read(self.tuned.base, reader.read, lambda mapped: SOURCE_DTYPES[reader.dtype_of(mapped.key)])
        self.read_buffers(reader.read, lambda mapped: SOURCE_DTYPES[reader.dtype_of(mapped.key)])
        if not resumed:
            self._start_lora()

    def _start_lora(self) -> None:
        lora = self._config.lora
        if lora is None:
            return
        of = adapters_of(self._table, lora)
        if lora.settings.starts_in_weight and lora.settings.init not in FROM_DATA:
            start_in_weights(self.parameters, self.tuned.base, of, from_weights(lora.seed))
            return
        for name in self.parameters:
            if MARK in name:  # nothing yet: `data_start`
                local(self.parameters[name]).zero_()
        weights = {mapped.name: name for name, mapped in self.tuned.base.items()}
        for name, mapped in self.tuned.trained.items():
            adapted = of.get(mapped.name)
            if adapted is None:  # a module in full
                continue
            for box in self.boxes(name):
                (first, *columns), (count, *widths) = box.region.offsets, box.region.sizes
                weight = None
                if adapted.dora:
                    weight = self._weight_rows(weights[f"{adapted.name}.weight"], first, count)
                start = first_values(mapped.name, adapted, weight, first, count, lora.seed)
                for axis, (begin, width) in enumerate(zip(columns, widths, strict=True), 1):
                    start = start.narrow(axis, begin, width)
                box.of(self.values(name)).copy_(start)

    @torch.no_grad()
    def load_adapter(self, source: AdapterSource) -> None:
        """Fill the adapters from a PEFT directory (`mswift.tuners.adapter.PeftAdapter`, `MethodAdapter`)."""
        lora, method, modules = self._config.lora, self._config.method, self._config.trainable_modules
        if method is not None:
            source.check(method.file_shapes(self._table, modules))
        else:
            assert lora is not None
            saved = expand_modules_to_save(self._table, modules)
            source.check(promised_shapes(lora.own_table(self._table), replace(lora.settings, modules_to_save=saved)))
        for name, tensor in {} if self.tuned.method is None else self.tuned.method.constants().items():
            tensor.copy_(source.read(name, Region.full(tuple(tensor.shape))))
        for name, mapped in self.tuned.trained.items():
            for box in self.boxes(name):
                box.of(self.values(name)).copy_(source.read(mapped.name, box.region))

    @torch.no_grad()
    def load_trained(self, read: Read, stored: Callable[[str], torch.dtype]) -> None:
        """What a checkpoint of the run holds of the weights; `stored`: dtype that `read` delivers of a key."""
        self.read(self.tuned.saved, read, lambda mapped: stored(mapped.key))
        if not self._config.trains_adapter:
            self.read_buffers(read, lambda mapped: stored(mapped.key))
        if self.tuned.method is not None:
            self.tuned.method.load(read)

    def read(self, parameters: Mapping[str, Mapped], read: Read, stored: Callable[[Mapped], torch.dtype]) -> None:
        """Fill what this rank has of these parameters."""
        for name, mapped in parameters.items():
            boxes, parameter = self.boxes(name), self.parameters[name]
            if not boxes and packed(parameter) is None:
                continue
            for values, read_part, dtype in passes(parameter, self.values(name), read, stored(mapped)):
                for box in boxes:
                    read_rows(mapped, box.region, box.of(values), read_part, dtype=dtype)

    def read_buffers(self, read: Read, stored: Callable[[Mapped], torch.dtype]) -> None:
        """What the model keeps beside its parameters, whole on every rank: a router's correction."""
        for name, mapped in self.tuned.buffers.items():
            read_rows(mapped, Region.full(mapped.shape), self._buffers[name], read, dtype=stored(mapped))

    # -- yielded

    def shards(self) -> Iterator[StateShard]:
        """What a checkpoint must hold of the weights: every element of the model on exactly one rank of the job.

        A run with adapters yields those alone (and the modules trained in full), keys `adapter.<PEFT name>`.
        """
        dtype = DTYPES[self._config.dtype]
        for name, mapped, box in self.answered(self.tuned.saved):
            yield from shards(mapped, box.region, box.of(self.values(name)).to(dtype))
        if not self._config.trains_adapter and self._rank == 0:
            for name, mapped in self.tuned.buffers.items():
                yield from shards(mapped, Region.full(mapped.shape), self._buffers[name])
        if self.tuned.method is not None:
            for shard in self.tuned.method.shards():  # on every rank: a network may be cut over them
                if self._rank == 0:
                    yield shard

    def answered(self, parameters: Mapping[str, Mapped]) -> Iterator[tuple[str, Mapped, Box]]:
        """Of these what this rank, and no other, answers for."""
        for name, mapped in parameters.items():
            if self.answers(name):
                for box in self.boxes(name):
                    yield name, mapped, box
