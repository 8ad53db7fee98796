"""Elementwise update rules: each rank updates its rows of every parameter."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mswift.config.optimizers import kept_by
from mswift.parallel.fsdp.config import HfSettings


@dataclass(frozen=True)
class Group:
    """Trained parameters with the same rule, decay and learning rate."""

    names: tuple[str, ...]
    decays: bool
    lr_factor: float = 1.0
    rule: str = "adam"


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023 (arXiv 2302.06675), algorithm 2: the sign of momentum and gradient mixed, decoupled decay."""

    def __init__(self, settings: Any, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(settings, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                momentum = state["exp_avg"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(momentum.lerp(parameter.grad, 1 - first).sign_(), alpha=group["lr"])
                momentum.lerp_(parameter.grad, 1 - second)


def optimizer_settings(groups: Sequence[Group], of: Mapping[str, Any], weight_decay: float) -> list[dict[str, Any]]:
    """torch's parameter groups; `of`: what stands there for a name."""
    return [
        {"params": [of[name] for name in group.names], "weight_decay": weight_decay if group.decays else 0.0}
        for group in groups
    ]


def torch_rule(rule: str, settings: list[dict[str, Any]], config: HfSettings) -> torch.optim.Optimizer:
    """An elementwise rule over parameter groups."""
    betas = (config.adam_beta1, config.adam_beta2)
    if rule == "sgd":
        return torch.optim.SGD(settings, lr=config.lr, momentum=config.sgd_momentum)
    if rule == "lion":
        return Lion(settings, config.lr, betas)
    return torch.optim.AdamW(settings, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)


class LocalRule:
    """An elementwise rule of some parameters, over `shards`: the fp32 rows of this rank, by name."""

    def __init__(self, rule: str, groups: Sequence[Group], shards: Mapping[str, Tensor], config: HfSettings) -> None:
        self._kind, self._groups, self._shards = rule, groups, shards
        self._kept = kept_by(rule, config.sgd_momentum)
        self._rule = torch_rule(rule, optimizer_settings(groups, shards, config.weight_decay), config)

    @property
    def names(self) -> Iterator[str]:
        """Parameters that it updates."""
        for group in self._groups:
            yield from group.names

    def step(self, lr: float) -> None:
        """One update."""
        for settings, group in zip(self._rule.param_groups, self._groups, strict=True):
            settings["lr"] = lr * group.lr_factor
        self._rule.step()

    def states(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor like the shard); none before the first step."""
        state = self._rule.state.get(self._shards[name], {})
        for key in self._kept:
            if state.get(key) is not None:
                yield key, state[key]

    def make_states(self, name: str, step: int) -> None:
        """Allocate the state as it is after `step` updates, tensors still zero."""
        shard = self._shards[name]
        state: dict[str, Tensor] = {key: torch.zeros_like(shard) for key in self._kept}
        if self._kind == "adam":
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=shard.device)
        self._rule.state[shard] = state

    def drop_states(self, name: str) -> None:
        """Let go of the state of a parameter; the next update that changes it begins anew."""
        self._rule.state.pop(self._shards[name], None)

    def state_bytes(self, idle: Set[str] = frozenset()) -> int:
        """Of this rank, counted from the start; `idle` parameters have none now."""
        elements = sum(self._shards[name].numel() for name in self.names if name not in idle)
        return 4 * elements * len(self._kept)
