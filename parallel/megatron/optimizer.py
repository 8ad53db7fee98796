"""megatron-core's distributed optimizer with the update rule of our choice, and its state by parameter."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer import ParamKey, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from mswift.config.optimizers import kept_by
from mswift.parallel.lora import IS_LORA_B
from mswift.parallel.megatron.config import EngineConfig, optimizer_config


class ShardedOptimizer:
    """Clips, steps and gathers; each data-parallel rank updates its flat range of every parameter.

    Experts have an optimizer of their own in megatron-core's chain, over their own data-parallel groups; the gradient
    norm is one.
    Vectors (norms, biases) have no weight decay.
    """

    def __init__(self, chunks: Sequence[MegatronModule], config: EngineConfig) -> None:
        self._config, self._chunks = config, chunks
        self._kept = kept_by(config.optimizer, config.sgd_momentum)
        core_config = optimizer_config(config, overlap_param_gather=chunks[0].ddp_config.overlap_param_gather)
        groups = get_standard_config_overrides(core_config)
        if config.lora_b_lr_ratio != 1:
            groups[ParamKey(attr=IS_LORA_B)] = {"lr_mult": config.lora_b_lr_ratio}  # type: ignore[typeddict-unknown-key]
        self._chained = get_megatron_optimizer(
            core_config, list(chunks), config_overrides=groups, use_gloo_process_groups=False
        )
        self._inners: list[DistributedOptimizer] = list(self._chained.chained_optimizers)
        for inner in self._inners:
            if not inner.is_stub_optimizer:
                inner.optimizer = _update_rule(inner.optimizer.param_groups, config)
            if config.dtype == "F32":  # masters are views of the model's weights: there is nothing to copy back
                inner._copy_main_params_to_model_params = lambda: None

    def step(self, lr: float, may_update: Callable[[float], bool]) -> tuple[float, bool]:
        """One update from the gradients in the buffers, if `may_update` of their global L2 norm before clipping.

        Returns the norm, and whether weights and states were updated; else they are as they were.
        """
        for inner in self._inners:
            for group in inner.param_groups:
                group["lr"] = lr * group["lr_mult"]
        self._chained.prepare_grads()
        grad_norm = float(self._chained.get_grad_norm())
        updated = may_update(grad_norm)
        if updated:
            self._clip(grad_norm)
            self._update()
        self._chained.zero_grad()
        return grad_norm, updated

    def _update(self) -> None:
        """As ChainedOptimizer.step_with_ready_grads, which gathers all weights once for each optimizer of the chain."""
        for inner in self._inners:
            MixedPrecisionOptimizer.step_with_ready_grads(inner)
        for chunk in self._chunks:
            if not chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync()

    def _clip(self, grad_norm: float) -> None:
        """As megatron-core's clip_grad_by_total_norm_fp32, which makes a scaled copy of every gradient, but in place.

        AdamW divides, and stores what it divided, in its own pass over the gradients; SGD's are multiplied before.
        """
        limit = self._config.clip_grad
        factor = limit / (grad_norm + 1e-6) if limit > 0 else 1.0
        for inner in self._inners:
            if inner.is_stub_optimizer:
                continue
            gradients = [parameter.grad for parameter in inner.get_parameters() if parameter.grad is not None]
            if self._config.optimizer == "adam":
                divisor = torch.tensor(1 / factor, device=gradients[0].device) if factor < 1 and gradients else None
                inner.optimizer.grad_scale = divisor
            elif factor < 1 and gradients:
                torch._foreach_mul_(gradients, factor)

    @property
    def bytes_per_element(self) -> int:
        """Bytes of state for each element that is updated: fp32 states, and an fp32 master of a bf16 weight."""
        return 4 * (len(self._kept) + (self._config.dtype != "F32"))

    def reload_parameters(self) -> None:
        """Take master weights from the model; after weights were loaded from outside."""
        self._chained.reload_model_params()

    def owned_range(self, parameter: Tensor) -> tuple[int, int] | None:
        """Flat range [start, stop) of a trained parameter that this rank updates, or None."""
        inner = self._of(parameter)
        if inner is None:
            return None
        span = inner._get_model_param_range_map(parameter)["param"]
        return span.start, span.end

    def _of(self, parameter: Tensor) -> DistributedOptimizer | None:
        """The optimizer with a share of the parameter on this rank: the dense one, or the experts'."""
        mine = (inner for inner in self._inners if not inner.is_stub_optimizer)
        return next((inner for inner in mine if parameter in inner.model_param_group_index_map), None)

    def master(self, parameter: Tensor) -> Tensor:
        """The fp32 values [stop - start] that the update rule works on; of an fp32 model a view of its weights."""
        inner = self._of(parameter)
        assert inner is not None
        group, order = inner.model_param_group_index_map[parameter]
        return inner.optimizer.param_groups[group]["params"][order]  # type: ignore[no-any-return]

    def states(self, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor [stop - start]) of the update rule; none before the first step."""
        inner = self._of(parameter)
        state = {} if inner is None else inner.optimizer.state.get(self.master(parameter), {})
        for name in self._kept:
            if name in state:
                yield name, state[name]

    def make_states(self, parameter: Tensor, step: int) -> None:
        """Allocate the state as it is after `step` updates, tensors still zero.

        Every parameter gets a step counter of its own: torch's Adam counts in place.
        """
        inner, master = self._of(parameter), self.master(parameter)
        assert inner is not None
        state: dict[str, Tensor] = {name: torch.zeros_like(master) for name in self._kept}
        if self._config.optimizer == "adam":
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=master.device)
        inner.optimizer.state[master] = state


def _update_rule(groups: list[dict[str, Any]], config: EngineConfig) -> torch.optim.Optimizer:
    """torch's own AdamW (one fused pass) or SGD over the flat shards that megatron-core made."""
    some = [nn.Parameter(torch.empty(1))]  # a torch optimizer takes leaves only; the shards are views, put in below
    rule: torch.optim.Optimizer
    if config.optimizer == "sgd":
        rule = torch.optim.SGD(some, lr=config.lr, momentum=config.sgd_momentum)
    else:
        betas = (config.adam_beta1, config.adam_beta2)
        rule = torch.optim.AdamW(some, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)
    defaults = {name: value for name, value in rule.param_groups[0].items() if name != "params"}
    rule.param_groups = [
        {
            **defaults,
            "params": group["params"],
            "weight_decay": config.weight_decay * group["wd_mult"],
            "lr_mult": group["lr_mult"],
        }
        for group in groups
    ]
    return rule
