"""Update rules over the shards of this rank, with the norm of the whole gradient."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mswift.config.optimizers import ELEMENTWISE, LowRank, rule_of
from mswift.converters.plan import EMBEDDING, ModelTable
from mswift.parallel.fsdp.config import HfSettings
from mswift.parallel.fsdp.methods import decays
from mswift.parallel.fsdp.pieces import local
from mswift.parallel.fsdp.rules import Group, LocalRule
from mswift.parallel.fsdp.tuned import TunedModel
from mswift.parallel.fsdp.whole import WholeRule


def update_groups(tuned: TunedModel, table: ModelTable, config: HfSettings) -> list[Group]:
    """What is trained, by update rule, decay and learning rate."""
    found: dict[tuple[bool, float, str], list[str]] = {}
    low_rank = LowRank.of(config)
    for name, mapped in tuned.trained.items():
        is_b = ".lora_A." not in mapped.name and ".lora_" in mapped.name
        factor = config.lora_b_lr_ratio if is_b else 1.0
        matrix = len(mapped.shape) > 1 if tuned.method is None else decays(mapped)
        place = table.megatron.get(mapped.key)
        in_layer = mapped.name in table.hf_in_layers if place is None else place.rule.in_layer
        is_embedding = mapped.name in table.hf_embeddings if place is None else mapped.key == EMBEDDING
        rule = rule_of(config.optimizer, mapped.shape, in_layer=in_layer, is_embedding=is_embedding, low_rank=low_rank)
        found.setdefault((matrix, factor, rule), []).append(name)
    return [Group(tuple(names), decay, factor, rule) for (decay, factor, rule), names in found.items()]


class ShardedOptimizer:
    """Clips and steps. Each rank updates its rows; replicas update the same ones, alike. Vectors have no decay."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        groups: Sequence[Group],
        config: HfSettings,
        norm_group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """norm_group: ranks that hold different rows; what is no DTensor they all hold whole.

        device: what its collectives take, wherever the rows lie.
        """
        self._parameters, self._config, self._norm_group = dict(parameters), config, norm_group
        self._device = device
        self._shards = {name: local(parameter).detach() for name, parameter in parameters.items()}
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        local_rules: list[LocalRule] = []
        self.whole: list[WholeRule] = []
        for rule in dict.fromkeys(group.rule for group in groups):
            own = [group for group in groups if group.rule == rule]
            if rule in ELEMENTWISE:
                local_rules.append(LocalRule(rule, own, self._shards, config))
            else:
                self.whole.append(WholeRule(rule, own, shapes, self._shards, config, norm_group, device))
        self._rules: list[LocalRule | WholeRule] = [*local_rules, *self.whole]
        self._local_of = {name: rule for rule in local_rules for name in rule.names}

    def shard(self, name: str) -> Tensor:
        """The fp32 rows of a parameter that this rank updates."""
        return self._shards[name]

    def step(self, lr: float, may_update: Callable[[float], bool]) -> tuple[float, bool]:
        """One update from the gradients, if `may_update` of their global L2 norm before clipping.

        Returns the norm, and whether there was an update; gradients are gone afterwards.
        """
        gradients, share = [], []
        for name, parameter in self._parameters.items():
            gradient = None if parameter.grad is None else local(parameter.grad)
            shard = self._shards[name]
            shard.grad = None if gradient is None or not gradient.numel() else gradient.to(shard.dtype)
            if shard.grad is not None:
                gradients.append(shard.grad)
                share.append(1 if isinstance(parameter, DTensor) else 1 / self._norm_group.size())
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32).double() for g in gradients]
        squares = [norm.square() * part for norm, part in zip(norms, share, strict=True)]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        total = total.to(self._device)
        dist.all_reduce(total, group=self._norm_group)
        grad_norm = float(total.sqrt())
        updated = may_update(grad_norm)
        if updated:
            limit = self._config.clip_grad
            factor = limit / (grad_norm + 1e-6) if limit > 0 else 1.0
            if factor < 1 and gradients:
                torch._foreach_mul_(gradients, factor)
            for rule in self._rules:
                rule.step(lr)
        return grad_norm, updated

    def forget_gradients(self) -> None:
        """Before the next step's first backward pass."""
        for name, parameter in self._parameters.items():
            parameter.grad = self._shards[name].grad = None

    def states(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor like the shard) of an elementwise rule; none before the first step."""
        if name in self._local_of:
            yield from self._local_of[name].states(name)

    def make_states(self, name: str, step: int) -> None:
        """Allocate the state of an elementwise rule as it is after `step` updates, tensors still zero."""
        if name in self._local_of:
            self._local_of[name].make_states(name, step)

    def drop_states(self, name: str) -> None:
        """Let go of the state of a parameter; the next update that changes it begins anew."""
        self._local_of[name].drop_states(name)

    def state_bytes(self, idle: Set[str] = frozenset()) -> int:
        """Of this rank's state, counted from the start; `idle` parameters have none now."""
        return sum(rule.state_bytes(idle) for rule in self._rules)
