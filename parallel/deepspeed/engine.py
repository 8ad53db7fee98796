"""The engine of transformers models under DeepSpeed's ZeRO: optimizer state, gradients or parameters cut over ranks."""

import gc
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from mswift.converters.plan import ModelTable
from mswift.parallel import device as devices
from mswift.parallel import sequence
from mswift.parallel.batch import Microbatch
from mswift.parallel.deepspeed.config import DeepspeedConfig
from mswift.parallel.deepspeed.weights import ZeroWeights
from mswift.parallel.deepspeed.zero import ZeroModel
from mswift.parallel.engine import DTYPES, Held, Read, StepResult
from mswift.parallel.fsdp.base_engine import BaseEngine
from mswift.parallel.fsdp.context import share_sequences
from mswift.parallel.fsdp.optimizer import update_groups
from mswift.parallel.fsdp.passes import Passes
from mswift.parallel.fsdp.state import RankState
from mswift.parallel.fsdp.tuned import tuned_model
from mswift.parallel.groups import give_up_after
from mswift.topology import ParallelDims


class DeepspeedEngine(BaseEngine):
    """One rank's part of a transformers model.

    To be made after `mswift.parallel.groups.init`. Weights hold nothing until `load_weights` or `load_state`.
    ConfigError for a model that transformers does not compute, or whose parameters the table does not know.
    """

    def __init__(self, table: ModelTable, dims: ParallelDims, config: DeepspeedConfig, device: torch.device) -> None:
        self.table, self.dims, self.config, self.device = table, dims, config, device
        rank = dist.get_rank()
        self.coordinate = dims.coordinate(rank)
        self.optimizer_step = 0
        self._tuned = tuned_model(table, config, device)
        for name, parameter in self._tuned.parameters().items():
            if self._tuned.method is None or name not in self._tuned.method.replicated:
                parameter.data = parameter.data.to(DTYPES[config.dtype])
        groups = update_groups(self._tuned, table, config)
        self._zero = ZeroModel(self._tuned, groups, config, dims.world_size, device, table.spec.hidden_size)
        self._weights = ZeroWeights(self._tuned, table, config, rank, self._zero)
        context, self._groups = share_sequences(dims, rank, config.cp_comm_type)
        give_up_after(self._groups, config.timeout_seconds)
        self._state = RankState(self._weights, self._zero, config, rank, 0, None)
        drops = self._tuned.drops(config)
        self._passes = Passes(self._zero.engine, dims, config, device, context, drops=drops, method=self._tuned.method)

    # -- weights and state

    def load_state(self, read: Read, optimizer_step: int) -> None:
        """Weights (adapters only in an adapter run) and optimizer state, written by any engine at any layout.

        The next update is number `optimizer_step` + 1.
        """
        self.optimizer_step = optimizer_step
        self._state.load(read, optimizer_step)
        self._zero.publish()

    # -- computing

    def train_step(self, microbatches: Sequence[Microbatch], lr: float, num_channels: int = 0) -> StepResult:
        """One update from these microbatches of this data-parallel rank, as `FsdpEngine.train_step`."""
        started = time.perf_counter()
        zero, step = self._zero, self.optimizer_step
        done = self._passes.train(microbatches, num_channels, step, zero.microbatch, zero.backward)
        devices.synchronize(self.device)
        computed = time.perf_counter()
        grad_norm, updated = zero.step(lr)
        devices.synchronize(self.device)
        self.optimizer_step += updated
        seconds = {"forward_backward": computed - started, "optimizer": time.perf_counter() - computed}
        return StepResult(done.loss, done.num_tokens, done.weight_sum, grad_norm, updated, seconds, None, done.channels)

    # -- sizes

    def held_bytes(self) -> tuple[Held, Held]:
        """What this rank holds for its (frozen, trained) parameters; masters count as optimizer."""
        names = self._weights.parameters
        frozen = [name for name in names if name not in self._tuned.trained]
        trained = [name for name in names if name in self._tuned.trained]
        zero = self._zero
        own = Held(*zero.weight_bytes(trained), zero.gradient_bytes(), zero.state_bytes())
        return Held(*zero.weight_bytes(frozen), 0, 0), own

    def close(self) -> None:
        """Let go of the model and of the groups; the engine is of no use afterwards."""
        sequence.share_with("p2p", None, 1)
        sequence.attending(None)
        self._zero.close()
        del self._tuned, self._zero, self._weights, self._state, self._passes
        while self._groups:
            dist.destroy_process_group(self._groups.pop())
        gc.collect()
