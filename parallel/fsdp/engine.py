"""The engine of transformers models: parameters cut over ranks by FSDP2, sequences by the Megatron engine's attention.

Shapes: b microbatch size, s padded sequence length, V vocabulary.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from mswift.config.optimizers import rule_of
from mswift.converters.adapters import expand_modules_to_save
from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable
from mswift.converters.reader import WeightReader
from mswift.errors import CheckpointError, LayoutError
from mswift.parallel import device as devices
from mswift.parallel import dropout, sequence
from mswift.parallel.batch import Microbatch, RankBatch, rank_batches, whole_rows
from mswift.parallel.engine import (
    DTYPES,
    SOURCE_DTYPES,
    AdapterSource,
    Held,
    LossPart,
    Read,
    StateShard,
    StepResult,
    bytes_of,
)
from mswift.parallel.four_bit import packed
from mswift.parallel.fsdp.adapters import adapters_of, add_lora, base_name, first_values, map_adapters, unwrapped
from mswift.parallel.fsdp.config import FsdpConfig
from mswift.parallel.fsdp.context import share_sequences
from mswift.parallel.fsdp.four_bit import pack_linears
from mswift.parallel.fsdp.hidden import adapters_in
from mswift.parallel.fsdp.lora_start import start_in_weights
from mswift.parallel.fsdp.methods import MethodAdapters, decays
from mswift.parallel.fsdp.model import (
    TrainedModel,
    add_noise,
    allocate,
    blocks,
    compile_layers,
    empty_model,
    last_microbatch,
    recompute,
    saved_buffers,
    shard,
)
from mswift.parallel.fsdp.optimizer import ShardedOptimizer, local
from mswift.parallel.fsdp.pieces import Mapped, map_parameters, read_rows, row_regions, shards, whole
from mswift.parallel.fsdp.rules import Group
from mswift.parallel.fsdp.sampled import SampledLayers, layers_of
from mswift.topology import ParallelDims
from mswift.tuners.part import Part
from mswift.tuners.shapes import promised_shapes

_INNER = "inner."


class FsdpEngine:
    """One rank's part of a transformers model.

    To be made after `mswift.parallel.groups.init`. Weights hold nothing until `load_weights` or `load_state`.
    ConfigError for a model that transformers does not compute, or whose parameters the table does not know.
    """

    def __init__(self, table: ModelTable, dims: ParallelDims, config: FsdpConfig, device: torch.device) -> None:
        self.table, self.dims, self.config, self.device = table, dims, config, device
        self.rank = dist.get_rank()
        self.coordinate = dims.coordinate(self.rank)
        self.optimizer_step = 0
        self._groups: list[dist.ProcessGroup] = []
        torch.manual_seed(config.seed)
        dtype = DTYPES[config.dtype] if config.trains_adapter else torch.float32
        inner = empty_model(table, dtype)
        kept = saved_buffers(inner)
        base = map_parameters({name: tuple(t.shape) for name, t in (*inner.named_parameters(), *kept.items())}, table)
        if config.lora is not None:
            add_lora(inner, table, config.lora, config.trainable_modules)
        self._method: MethodAdapters | None = None
        if config.method is not None:
            self._method = adapters_in(inner, table, config.method, config.trainable_modules)
        if config.trains_adapter:
            for parameter in inner.parameters():
                if parameter.requires_grad:  # fp32 masters; computed in the dtype of the run
                    parameter.data = parameter.data.float()
        before = base_name if self._method is None else self._method.base_names.get
        self._base = {name: base[found] for name, _ in inner.named_parameters() if (found := before(name))}
        self._buffers = {name: base[name] for name in kept}
        if config.part is not None:
            self._freeze(inner, config.part)
        self._saved = self._base if config.lora is None else map_adapters(inner, table, config.lora)
        if self._method is not None:
            self._saved = self._method.saved
        learning = {name for name, parameter in inner.named_parameters() if parameter.requires_grad}
        self._trained = {name: mapped for name, mapped in self._saved.items() if name in learning}
        self._state_of = self._trained
        if (
            config.part is not None or config.lisa is not None
        ):  # a global tensor may be trained in a part of it: state goes by transformers' names
            self._state_of = {name: whole(m.name, f"of.{m.name}", m.shape) for name, m in self._trained.items()}
        layer_of = layers_of(inner) if config.lisa is not None else {}
        if config.compile_layers:
            compile_layers(blocks(inner), device)
        recompute(blocks(inner)[: config.recompute_blocks], keep_products=config.recompute_keeps_products)
        if config.neftune_alpha:
            add_noise(inner, config.neftune_alpha)
        self._model = TrainedModel(inner, table.spec, config.loss_fusion)
        self._lay_out()
        self._parameters = {name.removeprefix(_INNER): parameter for name, parameter in self._model.named_parameters()}
        buffers = {unwrapped(name.removeprefix(_INNER)): buffer for name, buffer in self._model.named_buffers()}
        self._kept = {name: buffers[name] for name in self._buffers}
        self._context, made = share_sequences(dims, self.rank, config.cp_comm_type)
        self._groups += made
        trained = {name: self._parameters[name] for name in self._trained}
        self._optimizer = ShardedOptimizer(trained, self._optimizer_groups(trained), config, self._norm_group, device)
        self._sampled: SampledLayers | None = None
        if config.lisa is not None:
            self._sampled = SampledLayers(config.lisa, layer_of, trained, self._optimizer.drop_states)
            self._sampled.attach(self._model, lambda: self.optimizer_step)

    def _freeze(self, inner: torch.nn.Module, part: Part) -> None:
        """Frozen parameters are kept in the dtype of the run."""
        frozen = part.frozen({name: prod(mapped.shape) for name, mapped in self._base.items()})
        for name, parameter in inner.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
                parameter.data = parameter.data.to(DTYPES[self.config.dtype])

    def _lay_out(self) -> None:
        """Cut the parameters over ranks; `_norm_group`: ranks with different rows, `_copies` how many have the same."""
        config, world, kind = self.config, self.dims.world_size, self.device.type
        size = config.shard_size
        if world % size:
            raise LayoutError(f"--fsdp_shard_size {size} does not divide the {world} ranks")
        self._copies = world // size
        mesh = DeviceMesh(kind, torch.arange(world).view(self._copies, size), mesh_dim_names=("replicate", "shard"))
        self._groups += [mesh.get_group("replicate"), mesh.get_group("shard")]
        self._norm_group, self._copy = mesh.get_group("shard"), self.rank // size
        whole_ones = [] if self._method is None else [*self._method.replicated.values()]
        if config.four_bit_base is not None:
            whole_ones += pack_linears(blocks(self._model.inner), config.four_bit_base, self.device)
        if self._method is not None:
            self._method.move(self.device)
        if world == 1 and config.dtype == "F32" and not config.cpu_offload:
            allocate(self._model, self.device)
            return
        used = mesh["shard"] if self._copies == 1 else mesh
        dtype, reshard = DTYPES[config.dtype], config.reshard_after_forward
        shard(self._model, used, dtype, self.device, reshard, config.cpu_offload, whole_ones)

    def _optimizer_groups(self, trained: dict[str, torch.nn.Parameter]) -> list[Group]:
        config, table, ratio = self.config, self.table, self.config.lora_b_lr_ratio
        found: dict[tuple[bool, float, str], list[str]] = {}
        for name, mapped in self._trained.items():
            factor = ratio if ratio != 1 and ".lora_A." not in mapped.name and ".lora_" in mapped.name else 1.0
            matrix = len(mapped.shape) > 1 if self._method is None else decays(mapped)
            rule = rule_of(
                config.optimizer,
                mapped.shape,
                in_layer=mapped.name in table.hf_in_layers,
                is_embedding=mapped.name in table.hf_embeddings,
                rank=config.galore_rank,
            )
            found.setdefault((matrix, factor, rule), []).append(name)
        return [Group(tuple(names), decay, factor, rule) for (decay, factor, rule), names in found.items()]

    # -- weights

    def _rows(self, name: str) -> Region:
        """The rows of a parameter that this rank holds."""
        parameter = self._parameters[name]
        shape = tuple(parameter.shape)
        if not isinstance(parameter, DTensor):
            return Region.full(shape)
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, offsets = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        return row_regions(shape, offsets[0] if sizes[0] else 0, sizes[0])

    @torch.no_grad()
    def load_weights(self, reader: WeightReader, *, resumed: bool = False) -> None:
        """Fill the base from a checkpoint: this rank's rows and no others. Adapters get their start (not if resumed).

        Raises CheckpointError for another model than the engine's.
        """
        if reader.table.spec != self.table.spec:
            raise CheckpointError(f"{reader.hf_files}: another model ({reader.table.spec}) than {self.table.spec}")
        self._read(self._base, reader.read, lambda mapped: SOURCE_DTYPES[reader.dtype_of(mapped.key)])
        self._read_buffers(reader.read, lambda mapped: SOURCE_DTYPES[reader.dtype_of(mapped.key)])
        lora = self.config.lora
        if lora is None or resumed:
            return
        of = adapters_of(self.table, lora)
        if lora.settings.init != "true":
            start_in_weights(self._parameters, self._base, of, lora.seed)
            return
        weights = {mapped.name: name for name, mapped in self._base.items()}
        for name, mapped in self._trained.items():
            rows = self._rows(name)
            if mapped.name not in of or not rows.sizes[0]:  # a module in full
                continue
            weight = None
            if of[mapped.name].dora:
                weight = local(self._parameters[weights[f"{of[mapped.name].name}.weight"]])
            start = first_values(mapped.name, of[mapped.name], weight, rows.offsets[0], rows.sizes[0], lora.seed)
            local(self._parameters[name]).copy_(start)

    @torch.no_grad()
    def load_adapter(self, source: AdapterSource) -> None:
        """Fill the adapters from a PEFT directory (`mswift.tuners.adapter.PeftAdapter`, `MethodAdapter`)."""
        lora, method = self.config.lora, self.config.method
        if method is not None:
            source.check(method.file_shapes(self.table, self.config.trainable_modules))
        else:
            assert lora is not None
            saved = expand_modules_to_save(self.table, self.config.trainable_modules)
            source.check(promised_shapes(lora.own_table(self.table), replace(lora.settings, modules_to_save=saved)))
        for name, tensor in {} if self._method is None else self._method.constants().items():
            tensor.copy_(source.read(name, Region.full(tuple(tensor.shape))))
        for name, mapped in self._trained.items():
            rows = self._rows(name)
            if rows.sizes[0]:
                local(self._parameters[name]).copy_(source.read(mapped.name, rows))

    @torch.no_grad()
    def load_state(self, read: Read, optimizer_step: int) -> None:
        """Weights (adapters only in an adapter run) and optimizer state, written by any engine at any layout.

        `read` is asked for exactly the regions of this rank. The next update is number `optimizer_step` + 1.
        """
        self.optimizer_step = optimizer_step
        dtype = DTYPES[self.config.dtype]
        if not self.config.trains_adapter:
            self._read_buffers(read, lambda _: torch.float32)
        if self._method is not None:
            self._method.load(read)
            self._method.load_state(read)
        for name, mapped in self._trained.items():
            rows, shard = self._rows(name), self._optimizer.shard(name)
            if not rows.sizes[0]:
                continue
            if self.config.dtype == "F32":
                read_rows(mapped, rows, shard, read)
            else:  # the weights are what the masters are rounded to; both are asked for, as a strict reader wants
                read_rows(mapped, rows, torch.empty(rows.sizes, dtype=dtype), read)
                read_rows(self._state_of[name], rows, shard, read, "optimizer.master.")
            seen = optimizer_step if self._sampled is None else self._sampled.updates_of(name, optimizer_step)
            if seen:
                self._optimizer.make_states(name, seen)
                for key, values in self._optimizer.states(name):
                    read_rows(self._state_of[name], rows, values, read, f"optimizer.{key}.")
        self._read({n: m for n, m in self._saved.items() if n not in self._trained}, read, lambda _: dtype)
        if optimizer_step:
            self._load_whole_states(read, optimizer_step)

    def _load_whole_states(self, read: Read, optimizer_step: int) -> None:
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
        return f"optimizer.{state}.of.{self._trained[name].name}"

    @torch.no_grad()
    def load_trained(self, read: Read, stored: Callable[[str], torch.dtype]) -> None:
        """What is trained (of an adapter run: the adapters) and nothing else; `stored`: dtype that `read` delivers."""
        self._read(self._saved, read, lambda mapped: stored(mapped.key))
        if not self.config.trains_adapter:
            self._read_buffers(read, lambda mapped: stored(mapped.key))
        if self._method is not None:
            self._method.load(read)

    def _read(self, parameters: dict[str, Mapped], read: Read, stored: Callable[[Mapped], torch.dtype]) -> None:
        for name, mapped in parameters.items():
            rows = self._rows(name)
            four_bits = packed(self._parameters[name])
            if rows.sizes[0]:
                with four_bits.filled() if four_bits else nullcontext():
                    read_rows(mapped, rows, local(self._parameters[name]), read, dtype=stored(mapped))

    def _read_buffers(self, read: Read, stored: Callable[[Mapped], torch.dtype]) -> None:
        """What the model keeps beside its parameters, whole on every rank: a router's correction."""
        for name, mapped in self._buffers.items():
            read_rows(mapped, Region.full(mapped.shape), self._kept[name], read, dtype=stored(mapped))

    def model_shards(self) -> Iterator[StateShard]:
        """What a checkpoint must hold of the weights: every element of the model on exactly one rank of the job.

        A run with adapters yields those alone (and the modules trained in full), keys `adapter.<PEFT name>`.
        """
        dtype = DTYPES[self.config.dtype]
        for name, mapped, rows in self._answered(self._saved):
            values = local(self._parameters[name]).detach()
            yield from shards(mapped, rows, values.to(dtype))
        if not self.config.trains_adapter and self.rank == 0:
            for name, mapped in self._buffers.items():
                yield from shards(mapped, Region.full(mapped.shape), self._kept[name])
        if self._method is not None and self.rank == 0:
            yield from self._method.shards()

    def optimizer_shards(self) -> Iterator[StateShard]:
        """fp32 optimizer state, laid out like its parameter: `optimizer.<state>.<key>`; also fp32 masters of BF16.

        What a rule of whole matrices keeps is as it has it: `optimizer.<state>.of.<transformers' name>`.
        """
        for name, mapped, rows in self._answered(self._state_of):
            if self.config.dtype != "F32":
                yield from shards(mapped, rows, self._optimizer.shard(name), "optimizer.master.")
            for key, values in self._optimizer.states(name):
                yield from shards(mapped, rows, values, f"optimizer.{key}.")
        for rule in self._optimizer.whole if self._copy == 0 else ():
            for name in rule.owned:
                for key, values in rule.states(name):
                    shape = _at_least_1d(values.shape)
                    yield StateShard(self._whole_key(name, key), shape, Region.full(shape), values.contiguous())
        if self._method is not None and self.rank == 0:
            yield from self._method.state_shards()

    def gradients(self) -> Iterator[StateShard]:
        """fp32 gradients of the newest `train_step`, as clipped: `gradient.<key>`, each element on one rank."""
        for name, mapped, rows in self._answered(self._trained):
            gradient = self._optimizer.shard(name).grad
            if gradient is not None:
                yield from shards(mapped, rows, gradient, "gradient.")

    def _answered(self, parameters: dict[str, Mapped]) -> Iterator[tuple[str, Mapped, Region]]:
        """Of these the rows that this rank, and no other, answers for."""
        if self._copy:
            return
        for name, mapped in parameters.items():
            rows = self._rows(name)
            if rows.sizes[0] and (self.rank == 0 or isinstance(self._parameters[name], DTensor)):
                yield name, mapped, rows

    # -- computing

    def train_step(self, microbatches: Sequence[Microbatch], lr: float, num_channels: int = 0) -> StepResult:
        """One update from these microbatches of this data-parallel rank.

        The loss is the mean over the global batch, weighted by the tokens' loss weights. With `num_channels` they have
        `channels`, numbers below it.
        """
        started = time.perf_counter()
        self._optimizer.forget_gradients()
        batches = rank_batches(microbatches, self.dims, self.coordinate.cp)
        weights = sum(float(batch.loss_weights.sum(dtype=torch.float64)) for batch in batches)
        weight_sum = self._sum([weights])[0]
        sums = torch.zeros(1 + num_channels, dtype=torch.float64, device=self.device)
        places: list[dropout.BatchPlace] = []
        if self.config.neftune_alpha or self._drops:
            seed, done = self.config.seed, self.optimizer_step
            places = dropout.places(microbatches, batches, self.dims, self.coordinate, seed, done)
        for number, batch in enumerate(batches):
            where = dropout.at(places[number] if places else None)
            with where, last_microbatch(self._model, number == len(batches) - 1):
                found = self._forward(batch, num_channels)
                (found[0] / weight_sum if weight_sum else found[0] * float("nan")).backward()
            sums += found.detach().double()
        count = sum(int(torch.count_nonzero(batch.loss_weights)) for batch in batches)
        totals, channels = self._totals([float(sums[0]), count], sums[1:].tolist(), batches)
        loss = totals[0] / weight_sum if weight_sum else float("nan")
        if self._method is not None:
            self._method.sum_gradients()
        devices.synchronize(self.device)
        computed = time.perf_counter()
        grad_norm, updated = self._optimizer.step(lr, lambda norm: self._all_finite(loss, norm))
        devices.synchronize(self.device)
        self.optimizer_step += updated
        if self._method is not None and updated:
            self._method.after_update(self.optimizer_step)
        seconds = {"forward_backward": computed - started, "optimizer": time.perf_counter() - computed}
        return StepResult(loss, int(totals[1]), weight_sum, grad_norm, updated, seconds, None, channels)

    @property
    def _drops(self) -> bool:
        """Whether adapters have dropout."""
        lora = self.config.lora
        return self._method.drops if self._method is not None else lora is not None and bool(lora.settings.dropout)

    @torch.no_grad()
    def evaluate(
        self, microbatches: Sequence[Microbatch], num_channels: int = 0
    ) -> tuple[LossPart, tuple[LossPart, ...]]:
        """Loss over the global batch, and the parts of it by channel; touches no state of the training."""
        batches = rank_batches(microbatches, self.dims, self.coordinate.cp)
        weights = sum(float(batch.loss_weights.sum(dtype=torch.float64)) for batch in batches)
        sums = torch.zeros(1 + num_channels, dtype=torch.float64, device=self.device)
        for batch in batches:
            sums += self._forward(batch, num_channels).double()
        totals, channels = self._totals([float(sums[0]), weights], sums[1:].tolist(), batches)
        return LossPart(*totals), channels

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [b, s] of this data-parallel rank -> logits [b, s, V] in the model's dtype."""
        batch = rank_batches([Microbatch(tokens, tokens, torch.zeros_like(tokens))], self.dims, self.coordinate.cp)[0]
        mine = self._model(batch.tokens.to(self.device), self._positions(batch))
        parts = [mine]
        if self.dims.cp > 1:
            parts = [torch.empty_like(mine) for _ in range(self.dims.cp)]
            dist.all_gather(parts, mine.contiguous(), group=self._context)
        return whole_rows(parts, tokens.shape[1])

    def _forward(self, batch: RankBatch, num_channels: int) -> Tensor:
        channels = None
        if num_channels:
            assert batch.channels is not None
            channels = batch.channels.to(self.device)
        tensors = (batch.labels.to(self.device), batch.loss_weights.to(self.device))
        out: Tensor = self._model(
            batch.tokens.to(self.device), self._positions(batch), *tensors, channels, num_channels
        )
        return out

    def _positions(self, batch: RankBatch) -> Tensor:
        sequence.attending(batch.documents, shifted=self.config.shifted_attention and torch.is_grad_enabled())
        return sequence.document_positions(batch.documents, batch.seq_length, self.coordinate.cp, self.device)

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
        found = self._sum([*values, *by_channel, *weights.tolist()])
        apart = found[len(values) :]
        return found[: len(values)], tuple(map(LossPart, apart[:num_channels], apart[num_channels:]))

    def _sum(self, values: Sequence[float]) -> list[float]:
        """Over all ranks: each holds positions of its own."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()  # type: ignore[no-any-return]

    def _all_finite(self, *values: float) -> bool:
        finite = torch.tensor(all(map(math.isfinite, values)), dtype=torch.int32, device=self.device)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)

    # -- sizes

    @cached_property
    def num_parameters(self) -> int:
        """Elements of the global model, adapters not counted, tied embeddings once."""
        return sum(prod(tensor.shape) for tensor in self.table.megatron.values())

    @property
    def trainable_parameters(self) -> int:
        """Elements that the whole job trains."""
        return sum(prod(mapped.shape) for mapped in self._trained.values())

    def held_bytes(self) -> tuple[Held, Held]:
        """What this rank holds for its (frozen, trained) parameters."""
        frozen = [p for name, p in self._parameters.items() if name not in self._trained]
        idle = set() if self._sampled is None else self._sampled.idle(self.optimizer_step)
        trained = [self._parameters[name] for name in self._trained if name not in idle]
        (elements, weights), (resting, of_resting) = _size(trained), _size([self._parameters[name] for name in idle])
        state = self._optimizer.state_bytes(idle)
        return Held(*_size(frozen), 0, 0), Held(elements + resting, weights + of_resting, weights, state)

    def close(self) -> None:
        """Let go of the model and of the groups; the engine is of no use afterwards.

        What else holds groups, and so their threads: FSDP2's modules and states, a cycle, and DTensor's caches.
        """
        sequence.share_with("p2p", None, 1)
        sequence.attending(None)
        self._parameters, self._base, self._saved, self._trained, self._kept = {}, {}, {}, {}, {}
        del self._model, self._optimizer, self._sampled, self._norm_group, self._context, self._method
        while self._groups:
            if self._groups[-1] is not dist.group.WORLD:
                dist.destroy_process_group(self._groups[-1])
            self._groups.pop()
        _clear_sharding_prop_cache()
        gc.collect()


def _size(parameters: Sequence[Tensor]) -> tuple[int, int]:
    """(elements, bytes) of them on this rank."""
    mine = [local(parameter) for parameter in parameters]
    sizes = (each.numel() * each.element_size() if not (four := packed(each)) else four.nbytes for each in mine)
    return sum(each.numel() for each in mine), sum(sizes)


def _at_least_1d(shape: Sequence[int]) -> tuple[int, ...]:
    """A number is saved as a tensor of one element."""
    return tuple(shape) or (1,)
