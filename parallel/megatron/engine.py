"""The Megatron engine: one model on this rank, trained in steps, read and written as boxes of global tensors.

Shapes: b microbatch size, s padded sequence length, V vocabulary (without padding).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from mswift.converters.plan import ModelTable
from mswift.converters.reader import WeightReader
from mswift.errors import CheckpointError
from mswift.parallel import device as devices
from mswift.parallel import dropout
from mswift.parallel.adapters import adapter_tensors, add_lora, load_adapter
from mswift.parallel.batch import Microbatch, RankBatch, rank_batches
from mswift.parallel.engine import SOURCE_DTYPES, AdapterSource, Held, LossPart, Read, StateShard, StepResult
from mswift.parallel.four_bit import passes
from mswift.parallel.held_codes import HeldCodes
from mswift.parallel.lora_start import start_from_base
from mswift.parallel.megatron import schedule, world
from mswift.parallel.megatron.config import EngineConfig, check_device, ddp_config, transformer_config
from mswift.parallel.megatron.data_parallel import DataParallel
from mswift.parallel.megatron.ends import add_noise, differentiate_embeddings
from mswift.parallel.megatron.four_bit import linears_without_memory, pack_linears
from mswift.parallel.megatron.held import held_bytes
from mswift.parallel.megatron.model import build_model, padded_vocab_size
from mswift.parallel.megatron.optimizer import ShardedOptimizer
from mswift.parallel.megatron.part import TrainedPart
from mswift.parallel.megatron.placement import Placed, RankPlace, place_adapter, place_chunks
from mswift.parallel.megatron.state import ByNames, read_range, shards_of_range
from mswift.refusals import check_context_parallel
from mswift.refusals.engine import check_four_bit_base, check_prediction, check_prediction_flags
from mswift.topology import ParallelDims, check_experts


class MegatronEngine:
    """One rank's part of a model on megatron-core.

    To be made after `mswift.parallel.device.prepare` and `mswift.parallel.groups.init`. Weights hold nothing
    until `load_weights` or `load_state`. One engine at a time: a new one takes megatron-core's groups over.
    """

    def __init__(self, table: ModelTable, dims: ParallelDims, config: EngineConfig, device: torch.device) -> None:
        table.check_tp(dims.tp)
        check_experts(dims, table.spec.expert_layout)
        check_context_parallel(dims, config.cp_comm_type, table.spec)
        check_prediction(config.mtp_num_layers, table.spec)
        check_prediction_flags(config.mtp_num_layers, config.lora is not None)
        if config.four_bit_base:
            method = config.four_bit_base.method if isinstance(config.four_bit_base, HeldCodes) else "bnb"
            check_four_bit_base(config.lora is not None, config.lora is not None and config.lora.settings.dora, method)
        check_device(config, device)
        self._part = None if config.part is None else TrainedPart(config.part, table)
        world.enter(dims, config.seed, config.timeout_seconds)
        self.table, self.dims, self.config, self.device = table, dims, config, device
        self.coordinate = dims.coordinate(dist.get_rank())
        self.optimizer_step = 0
        self._core_config = transformer_config(table.spec, dims, config)
        four_bits = config.four_bit_base
        rows = padded_vocab_size(table.spec.vocab_size, dims.tp)
        with linears_without_memory(rows) if four_bits else nullcontext():
            chunks = build_model(table.spec, dims, self._core_config, device)
        for chunk in chunks:
            chunk.loss_fusion = config.loss_fusion
        if config.neftune_alpha:
            add_noise(chunks, config.neftune_alpha, table.spec)
        self._core_config.finalize_model_grads_func = self._finalize_gradients  # not before: layers copy the config
        self._place(chunks)
        self._chunks = [
            DataParallel(self._core_config, ddp_config(config, dims), chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
        schedule.overlap_gradients(self._core_config, self._chunks)
        self._optimizer = ShardedOptimizer(self._chunks, config)
        self._weight_sum = torch.zeros((), dtype=torch.float64, device=device)

    def _place(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Note what every parameter is of the whole; add adapters in between, since they rename the base."""
        self._base = place_chunks(chunks, self.table, self.dims, dist.get_rank())
        if self._part is not None:
            self._part.freeze(self._base)
            if self.config.recompute_granularity is not None or self.dims.pp > 1:
                differentiate_embeddings(chunks)
            self._base = place_chunks(chunks, self.table, self.dims, dist.get_rank())
        self._trained = self._base
        if self.config.four_bit_base:
            sources = {placed.parameter: placed.sources(self.table) for placed in self._base}
            pack_linears(chunks, self.config.four_bit_base, sources)
        if self.config.lora is not None:
            add_lora(chunks, self.table, self.config.lora, self.config.trainable_modules)
            if self.config.recompute_granularity is not None:
                differentiate_embeddings(chunks)
            place = RankPlace.of(self.dims, dist.get_rank(), self.table.spec)
            found = adapter_tensors(chunks)
            self._trained = [place_adapter(*slot, parameter, place) for slot, parameter in found]

    # -- weights

    @torch.no_grad()
    def load_weights(self, reader: WeightReader, *, resumed: bool = False) -> None:
        """Fill the base from a checkpoint: this rank's slices and no others; padded vocabulary rows are zero.

        Adapters get their start (not if resumed: `load_state` brings theirs). Raises CheckpointError for another model
        than the engine's.
        """
        if reader.table.spec != self.table.spec:
            raise CheckpointError(f"{reader.hf_files}: another model ({reader.table.spec}) than {self.table.spec}")
        self._read_parameters(self._base, reader.read, lambda placed: SOURCE_DTYPES[reader.dtype_of(placed.key)])
        if self.config.lora is not None and not resumed:
            start_from_base(self._chunks, self.config.lora.seed)
            self._optimizer.reload_parameters()

    @torch.no_grad()
    def load_adapter(self, source: AdapterSource) -> None:
        """Fill the adapters from a PEFT directory (`mswift.tuners.adapter.PeftAdapter`)."""
        assert self.config.lora is not None
        load_adapter(self._chunks, self.table, self.config.lora, self.config.trainable_modules, source)
        self._optimizer.reload_parameters()

    @torch.no_grad()
    def load_state(self, read: Read, optimizer_step: int) -> None:
        """Weights (adapters only in an adapter run) and optimizer state, written at any layout.

        `read` is asked for exactly the regions of this rank. The next update is number `optimizer_step` + 1.
        """
        self._read_parameters(self._trained, read, lambda placed: placed.parameter.dtype)
        self.optimizer_step = optimizer_step
        for placed, (start, stop) in self._owned():
            if self.config.dtype != "F32":
                master = self._optimizer.master(placed.parameter)
                read_range(placed, master, start, stop, read, "optimizer.master.", by_names=self._by_names)
            if optimizer_step:
                self._optimizer.make_states(placed.parameter, optimizer_step)
                for name, values in self._optimizer.states(placed.parameter):
                    read_range(placed, values, start, stop, read, f"optimizer.{name}.", by_names=self._by_names)

    @torch.no_grad()
    def load_trained(self, read: Read, stored: Callable[[str], torch.dtype]) -> None:
        """What is trained (of an adapter run: the adapters) and nothing else; `stored`: dtype that `read` delivers."""
        self._read_parameters(self._trained, read, lambda placed: stored(placed.key))

    def _read_parameters(
        self, parameters: Sequence[Placed], read: Read, stored: Callable[[Placed], torch.dtype]
    ) -> None:
        """stored: the dtype in which `read` delivers a parameter."""
        for placed in parameters:
            for values, read_part, dtype in passes(placed.parameter, placed.parameter.data, read, stored(placed)):
                read_range(placed, values.view(-1), 0, values.numel(), read_part, dtype=dtype)
        self._optimizer.reload_parameters()

    def model_shards(self) -> Iterator[StateShard]:
        """What a checkpoint must hold of the weights: every element of the model on exactly one rank of the job.

        A run with adapters yields those alone (and the modules trained in full), keys `adapter.<PEFT name>`.
        """
        for placed in self._trained:
            if placed.is_buffer and placed.is_primary:
                yield from shards_of_range(placed, placed.parameter.view(-1), 0, placed.parameter.numel())
        for placed, (start, stop) in self._owned():
            if placed.is_primary:
                values = placed.parameter.detach().view(-1)[start:stop]
                yield from shards_of_range(placed, values, start, stop)

    def optimizer_shards(self) -> Iterator[StateShard]:
        """fp32 optimizer state, laid out like its parameter: `optimizer.<state>.<key>`; also fp32 masters of BF16."""
        for placed, (start, stop) in self._owned():
            if not placed.is_primary:
                continue
            if self.config.dtype != "F32":
                master = self._optimizer.master(placed.parameter)
                yield from shards_of_range(placed, master, start, stop, "optimizer.master.", self._by_names)
            for name, values in self._optimizer.states(placed.parameter):
                yield from shards_of_range(placed, values, start, stop, f"optimizer.{name}.", self._by_names)

    def gradients(self) -> Iterator[StateShard]:
        """fp32 gradients of the newest `train_step`, as clipped: `gradient.<key>`, each element on one rank."""
        for placed, (start, stop) in self._owned():
            if placed.is_primary:
                values = placed.parameter.main_grad.view(-1)[start:stop]  # type: ignore[attr-defined]
                yield from shards_of_range(placed, values, start, stop, "gradient.")

    @property
    def _by_names(self) -> ByNames | None:
        """Where optimizer state lies, if not where its parameter does."""
        return None if self._part is None else self._part.by_names

    def _owned(self) -> Iterator[tuple[Placed, tuple[int, int]]]:
        """Trained parameters and the flat range of them that this data-parallel rank updates."""
        for placed in self._trained:
            span = None if placed.is_buffer else self._optimizer.owned_range(placed.parameter)
            if span is not None:
                yield placed, span

    # -- computing

    def train_step(self, microbatches: Sequence[Microbatch], lr: float, num_channels: int = 0) -> StepResult:
        """One update from these microbatches of this data-parallel rank (1F1B over pipeline stages).

        The loss is the mean over the global batch, weighted by the tokens' loss weights. Between pipeline stages all
        unpacked microbatches have one length. With `num_channels` they have `channels`, numbers below it.
        """
        started = time.perf_counter()
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        batches, weights = self._mine(microbatches, self.config.mtp_num_layers)
        self._weight_sum.fill_(weights)
        with dropout.counted(self._chunks, self._places(microbatches, batches)):
            sums = schedule.run(self._chunks, batches, self.device, forward_only=False, num_channels=num_channels)
        weight_sum = float(self._weight_sum)  # summed over ranks by _finalize_gradients
        count = sum(int(torch.count_nonzero(batch.loss_weights)) for batch in batches)
        totals, channels = self._sum_over_ranks([sums.loss, sums.mtp_loss, count], sums.channels, batches)
        loss, mtp_loss = (total / weight_sum if weight_sum else float("nan") for total in totals[:2])
        devices.synchronize(self.device)
        computed = time.perf_counter()
        grad_norm, updated = self._optimizer.step(lr, lambda norm: world.all_finite(self.device, loss, mtp_loss, norm))
        devices.synchronize(self.device)
        self.optimizer_step += updated
        seconds = {"forward_backward": computed - started, "optimizer": time.perf_counter() - computed}
        predicted = mtp_loss if self.config.mtp_num_layers else None
        return StepResult(loss, int(totals[2]), weight_sum, grad_norm, updated, seconds, predicted, channels)

    @torch.no_grad()
    def evaluate(
        self, microbatches: Sequence[Microbatch], num_channels: int = 0
    ) -> tuple[LossPart, tuple[LossPart, ...]]:
        """Loss over the global batch, and the parts of it by channel; touches no state of the training."""
        batches, weights = self._mine(microbatches)
        sums = schedule.run(self._chunks, batches, self.device, forward_only=True, num_channels=num_channels)
        totals, channels = self._sum_over_ranks([sums.loss, weights], sums.channels, batches)
        return LossPart(*totals), channels

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [b, s] of this data-parallel rank -> logits [b, s, V] in the model's dtype, on every rank."""
        batches, _ = self._mine([Microbatch(tokens, tokens, torch.zeros_like(tokens))])
        return schedule.logits(self._chunks, batches[0], tokens.shape[1], self.table.spec.vocab_size, self.device)

    def _mine(self, microbatches: Sequence[Microbatch], num_ahead: int = 0) -> tuple[list[RankBatch], float]:
        """The positions of this context-parallel rank, and the sum of their loss weights."""
        batches = rank_batches(microbatches, self.dims, self.coordinate.cp, num_ahead)
        return batches, sum(float(batch.loss_weights.sum(dtype=torch.float64)) for batch in batches)

    def _places(self, microbatches: Sequence[Microbatch], batches: Sequence[RankBatch]) -> list[dropout.BatchPlace]:
        """Which rows of the global batch these are, for adapters with dropout and for noise; [] where is neither."""
        drops = self.config.lora is not None and self.config.lora.settings.dropout > 0
        if not drops and not self.config.neftune_alpha:
            return []
        return dropout.places(microbatches, batches, self.dims, self.coordinate, self.config.seed, self.optimizer_step)

    @property
    def _reports(self) -> bool:
        """One rank for each position counts: the last pipeline stage of the first tensor-parallel rank."""
        return self.coordinate.tp == 0 and self.coordinate.pp == self.dims.pp - 1

    def _sum_over_ranks(
        self, values: Sequence[float], by_channel: Sequence[float], batches: Sequence[RankBatch]
    ) -> tuple[list[float], tuple[LossPart, ...]]:
        """Sums over the global batch, of values and of losses by channel, these with their weights."""
        num_channels = len(by_channel)
        weights = sum((_weights_by_channel(batch, num_channels) for batch in batches), torch.zeros(num_channels))
        mine = torch.tensor([*values, *by_channel, *weights.tolist()], dtype=torch.float64, device=self.device)
        total = mine if self._reports else torch.zeros_like(mine)
        dist.all_reduce(total)
        found = total.tolist()
        apart = found[len(values) :]
        return found[: len(values)], tuple(map(LossPart, apart[:num_channels], apart[num_channels:]))

    def _finalize_gradients(self, model: list[torch.nn.Module], _num_tokens: Tensor | None, **groups: object) -> None:
        """Sum gradients over ranks and divide by the sum of loss weights, which megatron-core would count as int."""
        schedule.finalize_gradients(model, self._weight_sum, **groups)

    # -- sizes

    @property
    def num_parameters(self) -> int:
        """Elements of the global model, adapters not counted, tied embeddings once."""
        return sum(prod(tensor.shape) for tensor in self.table.megatron.values())

    @property
    def trainable_parameters(self) -> int:
        """Elements that the whole job trains."""
        mine = [0, 0]
        for placed in self._trained:
            if placed.is_primary and not placed.is_buffer:
                mine[placed.is_expert] += sum(part.region.num_elements for part in placed.parts)
        total = torch.tensor(mine, dtype=torch.int64, device=self.device)
        dist.all_reduce(total)
        return int(total[0]) // (self.dims.dp * self.dims.cp) + int(total[1]) // self.dims.edp

    def held_bytes(self) -> tuple[Held, Held]:
        """What this rank holds for its (frozen, trained) parameters."""
        return held_bytes(self._base, self._trained, self._optimizer)

    def close(self) -> None:
        """Give megatron-core's groups back; the engine is of no use afterwards.

        The hooks on autograd's accumulators hold the model where Python's collector does not look; without letting
        go of them, groups (three threads each on gloo) and weights of every engine of a process would add up.
        """
        for chunk in self._chunks:
            chunk.let_go()
        self._chunks, self._base, self._trained = [], [], []
        schedule.forget(self._core_config)
        del self._optimizer
        world.leave()


def _weights_by_channel(batch: RankBatch, num_channels: int) -> Tensor:
    """fp64 [channels]"""
    if not num_channels:
        return torch.zeros(0, dtype=torch.float64)
    assert batch.channels is not None
    weights = batch.loss_weights.flatten().double().cpu()
    return torch.bincount(batch.channels.flatten().cpu(), weights, minlength=num_channels)
