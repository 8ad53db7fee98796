"""The starts of LoRA that take data (`mswift.tuners.data_start`), over all ranks of a job, whatever is cut.

Linears are dealt out: one rank gets the inputs of a linear from all ranks (EVA), or the sum of its weight's gradient
(LoRA-GA, `gradient_start`), computes A and B, and sends them to the others. Shapes: o, i features of a linear, n
tokens, b rows, s positions.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mswift.errors import ConfigError
from mswift.parallel.attention.share import Share, natural_rows
from mswift.parallel.batch import Microbatch, RankBatch, rank_batches
from mswift.parallel.fsdp.gradient_start import start_from_gradients
from mswift.parallel.fsdp.lora_start import linears, place
from mswift.parallel.fsdp.passes import Passes
from mswift.parallel.fsdp.weights import RankWeights
from mswift.topology import Coordinate, ParallelDims
from mswift.tuners.data_start import DataStart, Directions
from mswift.tuners.lora import Adapted

MOST_MICROBATCHES = 1000
"""After so many EVA gives up."""

_ROW_BITS = 16
"""Rows of a microbatch are fewer."""

Steps = Sequence[Sequence[Microbatch]]
"""Of each step the microbatches of this data-parallel rank."""


def start_from_data(
    weights: RankWeights,
    passes: Passes,
    of: Mapping[str, Adapted],
    dims: ParallelDims,
    steps: Steps,
    how: DataStart,
    seed: int,
    around: Callable[[bool], AbstractContextManager[None]],
    device: torch.device,
) -> str:
    """Fill A and B; what was done, in words. of: name of an A, in files -> its adapter; device: that computes.

    The weights are the base's, and adapters compute nothing yet. ConfigError, on all ranks, where EVA's directions go
    on turning, or what is seen is not finite.
    """
    inner: Any = weights.tuned.model.inner
    layers = {adapted.name: inner.get_submodule(adapted.name) for _, adapted in linears(of)}
    if how.kind == "eva":
        count = _eva(weights, passes, of, layers, dims, steps, how.tau, device)
        return f"eva: the directions of the inputs of {len(layers)} linears in {count} microbatches of each rank"
    start_from_gradients(weights, passes, of, layers, steps, how, seed, around)
    return f"lora_ga: gradients of the weights of {len(layers)} linears over {len(steps)} global batches"


class _Inputs:
    """Directions of the inputs of linears; those that are given the same tensor share them."""

    def __init__(self, of: Mapping[str, Adapted], tau: float, device: torch.device) -> None:
        self._world, self._rank, self._device, self._tau = dist.get_world_size(), dist.get_rank(), device, tau
        self._owner = {adapted.name: n % self._world for n, (_, adapted) in enumerate(linears(of))}
        self.leader: dict[str, str] = {}
        self._directions: dict[str, Directions] = {}
        self._ranks = {adapted.name: adapted.rank for _, adapted in linears(of)}
        self.open: list[str] = []
        self._last: tuple[Tensor, str] | None = None
        self._mask: Tensor | None = None
        self._sizes: list[int] = []
        self._order = torch.empty(0)
        self._not_finite = False

    def hook(self, name: str) -> Callable[..., None]:
        """A forward hook of the layer with this name."""

        def see(_module: Any, inputs: tuple[Tensor, ...], _output: Any) -> None:
            if self._mask is None:
                self._find_leader(name, inputs[0])
            elif name in self.open:
                self._add(name, inputs[0].reshape(-1, inputs[0].shape[-1])[self._mask].float())

        return see

    def _find_leader(self, name: str, x: Tensor) -> None:
        if self._last is None or self._last[0] is not x or self._ranks[self._last[1]] != self._ranks[name]:
            self._last = (x, name)
        self.leader[name] = self._last[1]

    def begin(self) -> None:
        """Leaders are known from now on."""
        self._last = None
        self.open = [name for name, leader in self.leader.items() if name == leader]
        own = [name for name in self.open if self._owner[name] == self._rank]
        self._directions = {name: Directions(self._ranks[name], self._tau) for name in own}

    def expect(self, mask: Tensor, places: Tensor) -> None:
        """mask [b, s]: which positions of this rank count in the next forward pass; places [b, s]: their order."""
        self._mask = mask.flatten().to(self._device)
        mine = places.flatten().to(self._device)[self._mask]
        size = torch.tensor([len(mine)], device=self._device)
        sizes = [torch.empty_like(size) for _ in range(self._world)]
        dist.all_gather(sizes, size)
        self._sizes = [int(each) for each in sizes]
        padded = mine.new_zeros(max(self._sizes))
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in self._sizes]
        dist.all_gather(parts, padded)
        self._order = self._cut(parts).argsort()

    def _cut(self, parts: Sequence[Tensor]) -> Tensor:
        """What all ranks sent, without its padding."""
        return torch.cat([part[:size] for part, size in zip(parts, self._sizes, strict=True)])

    def _add(self, name: str, rows: Tensor) -> None:
        """rows [n, i] of this rank to the owner."""
        owner = self._owner[name]
        padded = rows.new_zeros(max(self._sizes), rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in self._sizes] if owner == self._rank else None
        dist.gather(padded, parts, dst=owner)
        if parts is not None:
            of_all = self._cut(parts)[self._order]
            if of_all.isfinite().all():
                self._directions[name].add(of_all)
            else:
                self._not_finite = True

    def close_found(self) -> None:
        """All ranks forget the linears whose directions are found. ConfigError where an input was not finite."""
        found = [float(name in self._directions and self._directions[name].found) for name in self.open]
        found.append(float(self._not_finite))
        everywhere = torch.tensor(found, device=self._device)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
        *closed, broken = everywhere.tolist()
        if broken:
            raise ConfigError(
                "--init_weights eva: inputs of linears are not finite: the weights of --model are broken, or overflow "
                "in this dtype (--torch_dtype)"
            )
        self.open = [name for name, is_found in zip(self.open, closed, strict=True) if not is_found]

    def matrix(self, name: str, shape: tuple[int, int]) -> Tensor:
        """A [r, i] of a linear, on every rank."""
        leader = self.leader[name]
        owner = self._owner[leader]
        made = torch.empty(shape, device=self._device)
        if owner == self._rank:
            made.copy_(self._directions[leader].matrix)
        dist.broadcast(made, owner)
        return made


@torch.no_grad()
def _eva(
    weights: RankWeights,
    passes: Passes,
    of: Mapping[str, Adapted],
    layers: Mapping[str, Any],
    dims: ParallelDims,
    steps: Steps,
    tau: float,
    device: torch.device,
) -> int:
    here = dims.coordinate(dist.get_rank())
    inputs = _Inputs(of, tau, device)
    batches = [part for step in steps for part in rank_batches([_as_targets(m) for m in step], dims, here.cp)]
    count = 0
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(inputs.hook(name)).remove)
        passes.forward(batches[0], 0)
        inputs.begin()
        for batch in islice(cycle(batches), MOST_MICROBATCHES):
            inputs.expect(batch.loss_weights > 0, _places(batch, dims, here))
            passes.forward(batch, 0)
            count += 1
            inputs.close_found()
            if not inputs.open:
                break
        else:
            raise ConfigError(
                f"--init_weights eva: after {count} microbatches the inputs of {len(inputs.open)} linears "
                f"({inputs.open[0]} is the first) have no {of[f'{inputs.open[0]}.lora_A.weight'].rank} steady "
                "directions: use more data (--init_batches, --micro_batch_size), or a lower --lora_rank"
            )
    for _, adapted in linears(of):
        a = inputs.matrix(adapted.name, (adapted.rank, adapted.in_features))
        place(weights.parameters, adapted, a, a.new_zeros(adapted.out_features, adapted.rank))
    return count


def _places(batch: RankBatch, dims: ParallelDims, here: Coordinate) -> Tensor:
    """int64 [b, s]: in which order the positions of all ranks come, whoever shares sequences."""
    share = Share(batch.documents or (batch.seq_length,), (here.cp,), dims.cp)
    rows = torch.arange(len(batch.tokens))[:, None] + (here.dp << _ROW_BITS)
    return (rows << 32) + natural_rows(share, torch.device("cpu"))


def _as_targets(batch: Microbatch) -> Microbatch:
    """Weights at the tokens that are learned, in place of the positions before them: what PEFT's labels mark."""
    return replace(batch, loss_weights=F.pad(batch.loss_weights[:, :-1], (1, 0)))
