"""Update rules that need a matrix as a whole: one rank of those that share it gathers it, updates it, sends rows back.

That rank keeps the state. Matrices are dealt out in rounds, one for each rank, so that all ranks compute at a time and
each holds one whole matrix with its gradient. Without sharing every rank updates its copy, alike.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mswift.config.optimizers import QUANTIZED, LowRank, state_bytes, state_of
from mswift.parallel.fsdp.config import HfSettings
from mswift.parallel.fsdp.libraries import Adafactor, AdamW8bit, Apollo, GaLore, Library, Muon
from mswift.parallel.fsdp.q_galore import QGaLore
from mswift.parallel.fsdp.rules import Group, optimizer_settings

_DTYPES = {"F32": torch.float32, "U8": torch.uint8}
_LIBRARIES: dict[str, type[Library]] = {
    "adafactor": Adafactor,
    "muon": Muon,
    "adamw_8bit": AdamW8bit,
    "galore": GaLore,
    QUANTIZED: QGaLore,
    "apollo": Apollo,
}


class WholeRule:
    """A rule of `mswift.config.optimizers` for the parameters of `groups`.

    shapes: whole ones, by name; shards: the fp32 rows of this rank.
    group: the ranks that share rows, torch.chunk by torch.chunk; device: of its collectives.
    """

    def __init__(
        self,
        rule: str,
        groups: Sequence[Group],
        shapes: Mapping[str, tuple[int, ...]],
        shards: Mapping[str, Tensor],
        config: HfSettings,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._kind, self._shapes, self._shards, self._config = rule, shapes, shards, config
        self._sent_on = device
        self._group, self._size, self._rank = group, dist.get_world_size(group), dist.get_rank(group)
        names = [name for each in groups for name in each.names]
        order = sorted(names, key=lambda name: -prod(shapes[name]))
        self._rounds = [order[n : n + self._size] for n in range(0, len(order), self._size)]
        if self._size == 1:
            self._rounds = [names]
        mine = set(names) if self._size == 1 else {each[self._rank] for each in self._rounds if self._rank < len(each)}
        self._device = next(iter(shards.values())).device
        empty = {name: torch.empty((0,) * len(shapes[name]), device=self._device) for name in names}
        self._stand_ins = {name: nn.Parameter(empty[name]) for name in names if name in mine}
        own = [Group(tuple(n for n in g.names if n in mine), g.decays, g.lr_factor, g.rule) for g in groups]
        self._groups = [each for each in own if each.names]
        self._library = None
        if self._groups:
            settings = optimizer_settings(self._groups, self._stand_ins, config.weight_decay)
            seeds = [names.index(name) + 1 for each in self._groups for name in each.names]
            self._library = _LIBRARIES[rule](config, settings, seeds)

    # -- updates

    def step(self, lr: float) -> None:
        """One update of all parameters that have a gradient."""
        if self._library is not None:
            for settings, group in zip(self._library.optimizer.param_groups, self._groups, strict=True):
                settings["lr"] = lr * group.lr_factor
        learning = self._learning()
        for names in self._rounds:
            here = [name for name in names if name in learning]
            for name in here:
                self._bring(name, names.index(name))
            if self._library is not None:
                self._library.step()
            for name in here:
                self._give_back(name, names.index(name))

    def _learning(self) -> set[str]:
        """Parameters that have a gradient on some rank."""
        names = [name for each in self._rounds for name in each]
        has = torch.tensor([self._shards[name].grad is not None for name in names], dtype=torch.int32)
        if self._size > 1:
            has = has.to(self._sent_on)
            dist.all_reduce(has, op=dist.ReduceOp.MAX, group=self._group)
        return {name for name, number in zip(names, has.tolist(), strict=True) if number}

    def _bring(self, name: str, owner: int) -> None:
        """The whole matrix and its gradient into the stand-in of its owner."""
        shard = self._shards[name]
        weight: Tensor | None = shard
        gradient = shard.grad
        if self._size > 1:
            weight = self._gathered(name, shard, owner)
            gradient = self._gathered(name, shard if shard.grad is None else shard.grad, owner, shard.grad is None)
        if name in self._stand_ins:
            assert weight is not None
            self._stand_ins[name].data, self._stand_ins[name].grad = weight, gradient

    def _give_back(self, name: str, owner: int) -> None:
        """Rows to the ranks that hold them; the stand-in is empty again."""
        shard = self._shards[name]
        if self._size > 1:
            parts = None
            if owner == self._rank:
                parts = list(self._padded(self._stand_ins[name].data, self._rows(name) * self._size).chunk(self._size))
            rows = torch.empty((self._rows(name), *shard.shape[1:]), device=self._sent_on)
            dist.scatter(rows, parts, group=self._group, group_src=owner)
            shard.copy_(rows[: len(shard)])
        if name in self._stand_ins:
            self._stand_ins[name].grad = None
            self._stand_ins[name].data = shard.new_empty((0,) * shard.dim())

    def _rows(self, name: str) -> int:
        """Of a rank, the last ones excepted."""
        return -(-self._shapes[name][0] // self._size)

    def _padded(self, rows: Tensor, count: int) -> Tensor:
        padded = torch.zeros((count, *rows.shape[1:]), device=self._sent_on)
        padded[: len(rows)] = rows
        return padded

    def _gathered(self, name: str, rows: Tensor, owner: int, zero: bool = False) -> Tensor | None:
        padded = self._padded(rows[:0] if zero else rows, self._rows(name))
        parts = [torch.empty_like(padded) for _ in range(self._size)] if owner == self._rank else None
        dist.gather(padded, parts, group=self._group, group_dst=owner)
        return None if parts is None else torch.cat(parts)[: self._shapes[name][0]].to(self._device).contiguous()

    # -- state

    @property
    def owned(self) -> Iterator[str]:
        """Parameters whose state this rank keeps."""
        yield from self._stand_ins

    def states(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of an owned parameter; none before the first step."""
        assert self._library is not None
        yield from self._library.tensors(self._stand_ins[name]).items()

    def empty_states(self, name: str) -> dict[str, Tensor]:
        """Memory for the state of an owned parameter."""
        wanted = state_of(self._kind, self._shapes[name], LowRank.of(self._config))
        return {key: torch.empty(shape, dtype=_DTYPES[of], device=self._device) for key, (shape, of) in wanted.items()}

    def restore(self, name: str, tensors: Mapping[str, Tensor], step: int) -> None:
        """Put the state of an owned parameter back, as it was after `step` updates."""
        assert self._library is not None
        self._library.restore(self._stand_ins[name], tensors, step)

    def state_bytes(self, idle: Set[str] = frozenset()) -> int:
        """Of this rank, counted from the start; all parameters have theirs."""
        assert not idle
        low_rank = LowRank.of(self._config)
        return sum(state_bytes(self._kind, self._shapes[name], low_rank) for name in self._stand_ins)
