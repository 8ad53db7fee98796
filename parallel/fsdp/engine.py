"""The engine of transformers models: parameters cut by FSDP2, sequences by the Megatron engine's attention."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from mswift.converters.plan import ModelTable
from mswift.parallel import device as devices
from mswift.parallel import sequence
from mswift.parallel.batch import Microbatch
from mswift.parallel.engine import Held, LossPart, Read, StateShard, StepResult
from mswift.parallel.four_bit import packed
from mswift.parallel.fsdp.adapters import adapters_of
from mswift.parallel.fsdp.base_engine import BaseEngine
from mswift.parallel.fsdp.config import FsdpConfig
from mswift.parallel.fsdp.context import share_sequences
from mswift.parallel.fsdp.data_start import start_from_data
from mswift.parallel.fsdp.layout import forward_alone, last_microbatch, lay_out
from mswift.parallel.fsdp.optimizer import ShardedOptimizer, update_groups
from mswift.parallel.fsdp.passes import Passes
from mswift.parallel.fsdp.pieces import local
from mswift.parallel.fsdp.sampled import SampledLayers
from mswift.parallel.fsdp.state import RankState
from mswift.parallel.fsdp.tuned import tuned_model
from mswift.parallel.fsdp.weights import RankWeights
from mswift.parallel.groups import give_up_after
from mswift.topology import ParallelDims
from mswift.tuners.data_start import DataStart


class FsdpEngine(BaseEngine):
    """One rank's part of a transformers model.

    To be made after `mswift.parallel.groups.init`. Weights hold nothing until `load_weights` or `load_state`.
    ConfigError for a model that transformers does not compute, or whose parameters the table does not know.
    """

    def __init__(self, table: ModelTable, dims: ParallelDims, config: FsdpConfig, device: torch.device) -> None:
        self.table, self.dims, self.config, self.device = table, dims, config, device
        rank = dist.get_rank()
        self.coordinate = dims.coordinate(rank)
        self.optimizer_step = 0
        self._tuned = tuned_model(table, config, device)
        self._method = self._tuned.method
        layout = lay_out(self._tuned, dims.world_size, config, device)
        self._weights = RankWeights(self._tuned, table, config, rank, layout.copy)
        context, made = share_sequences(dims, rank, config.cp_comm_type)
        self._groups = layout.groups + made
        give_up_after(self._groups, config.timeout_seconds)
        trained = {name: self._weights.parameters[name] for name in self._tuned.trained}
        groups = update_groups(self._tuned, table, config)
        self._optimizer = ShardedOptimizer(trained, groups, config, layout.sharing, device)
        self._sampled: SampledLayers | None = None
        if config.lisa is not None:
            self._sampled = SampledLayers(config.lisa, self._tuned.layer_of, trained, self._optimizer.drop_states)
            self._sampled.attach(self._tuned.model, lambda: self.optimizer_step)
        self._state = RankState(self._weights, self._optimizer, config, rank, layout.copy, self._sampled)
        self._passes = Passes(
            self._tuned.model, dims, config, device, context, drops=self._tuned.drops(config), method=self._method
        )

    # -- weights and state

    def start_from_data(self, steps: Sequence[Sequence[Microbatch]], how: DataStart) -> str:
        """The start of adapters that takes data (`mswift.parallel.fsdp.data_start`), in words.

        steps: of each the microbatches of this data-parallel rank.
        """
        lora = self.config.lora
        assert lora is not None
        of = adapters_of(self.table, lora)
        around, device = self._around, self.device
        with forward_alone(self._tuned.model):
            done = start_from_data(self._weights, self._passes, of, self.dims, steps, how, lora.seed, around, device)
        self._optimizer.forget_gradients()
        return done

    def load_state(self, read: Read, optimizer_step: int) -> None:
        """Weights (adapters only in an adapter run) and optimizer state, written by any engine at any layout.

        `read` is asked for exactly the regions of this rank. The next update is number `optimizer_step` + 1.
        """
        self.optimizer_step = optimizer_step
        self._state.load(read, optimizer_step)

    def gradients(self) -> Iterator[StateShard]:
        """fp32 gradients of the newest `train_step`, as clipped: `gradient.<key>`, each element on one rank."""
        yield from self._state.gradients()

    # -- computing

    def train_step(self, microbatches: Sequence[Microbatch], lr: float, num_channels: int = 0) -> StepResult:
        """One update from these microbatches of this data-parallel rank.

        The loss is the mean over the global batch, weighted by the tokens' loss weights. With `num_channels` they have
        `channels`, numbers below it.
        """
        started = time.perf_counter()
        self._optimizer.forget_gradients()
        done = self._passes.train(microbatches, num_channels, self.optimizer_step, self._around)
        if self._method is not None:
            self._method.sum_gradients()
        devices.synchronize(self.device)
        computed = time.perf_counter()
        grad_norm, updated = self._optimizer.step(lr, lambda norm: self._passes.all_finite(done.loss, norm))
        devices.synchronize(self.device)
        self.optimizer_step += updated
        if self._method is not None and updated:
            self._method.after_update(self.optimizer_step)
        seconds = {"forward_backward": computed - started, "optimizer": time.perf_counter() - computed}
        return StepResult(done.loss, done.num_tokens, done.weight_sum, grad_norm, updated, seconds, None, done.channels)

    def evaluate(
        self, microbatches: Sequence[Microbatch], num_channels: int = 0
    ) -> tuple[LossPart, tuple[LossPart, ...]]:
        """As its parent."""
        with forward_alone(self._tuned.model):
            return super().evaluate(microbatches, num_channels)

    def logits(self, tokens: Tensor) -> Tensor:
        """As its parent."""
        with forward_alone(self._tuned.model):
            return super().logits(tokens)

    def _around(self, is_last: bool) -> AbstractContextManager[None]:
        return last_microbatch(self._tuned.model, is_last)

    # -- sizes

    def held_bytes(self) -> tuple[Held, Held]:
        """What this rank holds for its (frozen, trained) parameters."""
        parameters, learning = self._weights.parameters, self._tuned.trained
        frozen = [parameter for name, parameter in parameters.items() if name not in learning]
        idle = set() if self._sampled is None else self._sampled.idle(self.optimizer_step)
        trained = [parameters[name] for name in learning if name not in idle]
        (elements, weights), (resting, of_resting) = _size(trained), _size([parameters[name] for name in idle])
        state = self._optimizer.state_bytes(idle)
        return Held(*_size(frozen), 0, 0), Held(elements + resting, weights + of_resting, weights, state)

    def close(self) -> None:
        """Let go of the model and of the groups; the engine is of no use afterwards.

        What else holds groups, and so their threads: FSDP2's modules and states, a cycle, and DTensor's caches.
        """
        sequence.share_with("p2p", None, 1)
        sequence.attending(None)
        del self._tuned, self._method, self._weights, self._optimizer, self._sampled, self._state, self._passes
        while self._groups:
            if self._groups[-1] is not dist.group.WORLD:
                dist.destroy_process_group(self._groups[-1])
            self._groups.pop()
        _clear_sharding_prop_cache()
        gc.collect()


def _size(parameters: Sequence[Tensor]) -> tuple[int, int]:
    """(elements, bytes) of them on this rank."""
    mine = [local(parameter) for parameter in parameters]
    sizes = [(each.numel(), each.numel() * each.element_size()) for each in mine if not packed(each)]
    sizes += [(four.elements, four.nbytes) for each in mine if (four := packed(each))]
    return sum(elements for elements, _ in sizes), sum(num_bytes for _, num_bytes in sizes)
