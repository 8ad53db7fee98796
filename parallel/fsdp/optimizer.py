"""torch's update rules over the shards of this rank, with the norm of the whole gradient."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mswift.parallel.fsdp.config import FsdpConfig

STATES = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""Names of an update rule's fp32 tensors, each shaped like the parameter."""


@dataclass(frozen=True)
class Group:
    """Trained parameters with the same decay and learning rate."""

    names: tuple[str, ...]
    decays: bool
    lr_factor: float = 1.0


def local(tensor: Tensor) -> Tensor:
    """This rank's rows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ShardedOptimizer:
    """Clips and steps. Each rank updates its rows; replicas update the same ones, alike. Vectors have no decay."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        groups: Sequence[Group],
        config: FsdpConfig,
        norm_group: dist.ProcessGroup,
    ) -> None:
        """norm_group: ranks that hold different rows; what is no DTensor they all hold whole."""
        self._parameters, self._config, self._norm_group = dict(parameters), config, norm_group
        self._shards = {name: local(parameter).detach() for name, parameter in parameters.items()}
        self._factors = [group.lr_factor for group in groups]
        settings = [
            {
                "params": [self._shards[name] for name in group.names],
                "weight_decay": config.weight_decay if group.decays else 0.0,
            }
            for group in groups
        ]
        if config.optimizer == "sgd":
            self._rule: torch.optim.Optimizer = torch.optim.SGD(settings, lr=config.lr, momentum=config.sgd_momentum)
        else:
            betas = (config.adam_beta1, config.adam_beta2)
            self._rule = torch.optim.AdamW(settings, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)

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
        device = next(iter(self._shards.values())).device
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self._norm_group)
        grad_norm = float(total.sqrt())
        updated = may_update(grad_norm)
        if updated:
            limit = self._config.clip_grad
            factor = limit / (grad_norm + 1e-6) if limit > 0 else 1.0
            if factor < 1 and gradients:
                torch._foreach_mul_(gradients, factor)
            for group, of in zip(self._rule.param_groups, self._factors, strict=True):
                group["lr"] = lr * of
            self._rule.step()
        return grad_norm, updated

    def forget_gradients(self) -> None:
        """Before the next step's first backward pass."""
        for name, parameter in self._parameters.items():
            parameter.grad = self._shards[name].grad = None

    def states(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor like the shard) of the update rule; none before the first step."""
        state = self._rule.state.get(self._shards[name], {})
        for key in STATES[self._config.optimizer]:
            if state.get(key) is not None:
                yield key, state[key]

    def make_states(self, name: str, step: int) -> None:
        """Allocate the state as it is after `step` updates, tensors still zero."""
        shard = self._shards[name]
        state: dict[str, Tensor] = {key: torch.zeros_like(shard) for key in STATES[self._config.optimizer]}
        if self._config.optimizer == "adam":
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=shard.device)
        self._rule.state[shard] = state

    def drop_states(self, name: str) -> None:
        """Let go of the state of a parameter; the next update that changes it begins anew."""
        self._rule.state.pop(self._shards[name], None)

    @property
    def bytes_per_element(self) -> int:
        """Of fp32 state for each element that is updated."""
        return 4 * len(STATES[self._config.optimizer])
