"""A model whose state, gradients or parameters DeepSpeed cuts over ranks, with torch's update rule.

What this rank has of a parameter is a `Fragment`: of a trained one the fp32 masters that it updates, of a frozen one
what it holds of the values.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from mswift.config.optimizers import kept_by
from mswift.parallel.deepspeed.config import DeepspeedConfig, library_config
from mswift.parallel.deepspeed.fragments import Fragment
from mswift.parallel.deepspeed.library import Library
from mswift.parallel.fsdp.model import TrainedModel, allocate, blocks
from mswift.parallel.fsdp.rules import Group, optimizer_settings, torch_rule
from mswift.parallel.fsdp.tuned import TunedModel


class ZeroModel:
    """`engine` is called as the model is; `groups` are its trained parameters."""

    whole: Sequence[Any] = ()
    """Rules that need matrices as a whole: none."""

    def __init__(
        self,
        tuned: TunedModel,
        groups: Sequence[Group],
        config: DeepspeedConfig,
        world_size: int,
        device: torch.device,
        hidden_size: int,
    ) -> None:
        self._groups, self._config, self._world_size = groups, config, world_size
        self._stage = config.zero.stage
        self._kind = groups[0].rule
        self._kept = kept_by(self._kind, config.sgd_momentum)
        self._library = Library(device)
        library = self._library.module
        trained = sum(prod(mapped.shape) for mapped in tuned.trained.values())
        told, model = library_config(config, world_size, device, trained, hidden_size), tuned.model
        with self._library.quiet():
            _give_memory(model, device, library, told if self._stage == 3 else None)
            self._parameters = tuned.parameters()
            settings = optimizer_settings(groups, self._parameters, config.weight_decay)
            self._rule = torch_rule(self._kind, settings, config)
            self.engine: Any = library.initialize(model=model, optimizer=self._rule, config=told)[0]
        if self._stage == 3:  # the loss may be computed of the output layer's weight, without a call of that layer
            library.zero.register_external_parameter(model, model.inner.get_output_embeddings().weight)  # type: ignore[operator]
        self._zero: Any = self.engine.optimizer
        self._fragments = {name: self._fragment(name) for name in self._parameters}

    # -- what lies where

    def _fragment(self, name: str) -> Fragment | None:
        parameter = self._parameters[name]
        if self._stage == 3:
            return self._cut_fragment(parameter)
        if not parameter.requires_grad:
            return Fragment(0, parameter.numel(), parameter.data.view(-1))
        place = parameter._hp_mapping  # type: ignore[attr-defined]
        if place is None:
            return None
        flat = self._rule.param_groups[place.param_group_index]["params"][0]
        inside, outside = place.hp_fragment_address, place.lp_fragment_address
        return Fragment(outside.start, outside.numel, flat, inside.start)

    def _cut_fragment(self, parameter: Any) -> Fragment | None:
        """Of ZeRO-3, which cuts every parameter into as many equal parts as there are ranks."""
        size = parameter.ds_tensor.ds_numel
        start = size * parameter.ds_zero_partition_rank
        count = min(size, parameter.ds_numel - start)
        if count <= 0:
            return None
        if not parameter.requires_grad:
            return Fragment(start, count, parameter.ds_tensor)
        number, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return Fragment(start, count, self._zero.fp32_partitioned_groups_flat[number], offset)

    def fragment(self, name: str) -> Fragment | None:
        """None where this rank has nothing of a parameter."""
        return self._fragments[name]

    def is_cut(self, name: str) -> bool:
        """Whether every rank has elements of its own of this parameter, not all of them."""
        return self._stage == 3 or self._parameters[name].requires_grad

    def publish(self) -> None:
        """Masters have new values: all ranks compute with these from here on."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for number in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        kept = self._zero.persistent_parameters
        if kept:
            kept[0].all_gather(kept)

    # -- steps

    @contextmanager
    def microbatch(self, is_last: bool) -> Iterator[None]:
        """One microbatch: ZeRO-1 sums gradients in the last of a step, ZeRO-2 and 3, which keep a share, in each."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """A microbatch's share of the loss; one that is not finite makes all gradients so, and `step` leaves it out."""
        times = float(self._world_size) if self._stage == 3 else 1.0
        factor = torch.where(loss.detach().isfinite(), times, float("nan"))
        self.engine.backward(loss * factor, scale_wrt_gas=False)

    def step(self, lr: float) -> tuple[float, bool]:
        """One update; the norm of the whole gradient before clipping, and whether there was one (it is finite)."""
        for settings, group in zip(self._rule.param_groups, self._groups, strict=True):
            settings["lr"] = lr * group.lr_factor
        self.engine.step()
        return float(self.engine.get_global_grad_norm()), bool(self.engine.was_step_applied())

    # -- state

    def shard(self, name: str) -> Tensor:
        """This rank's fp32 masters of a trained parameter, [count]."""
        fragment = self._fragments[name]
        assert fragment is not None
        return fragment.values

    def states(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor like the shard); none before the first step."""
        fragment = self._fragments[name]
        assert fragment is not None
        state = self._rule.state.get(fragment.flat, {})
        for key in self._kept:
            if state.get(key) is not None:
                yield key, fragment.of(state[key])

    def make_states(self, name: str, step: int) -> None:
        """Allocate the state as it is after `step` updates, of all that lies with this parameter; zero where new."""
        fragment = self._fragments[name]
        assert fragment is not None
        state = self._rule.state[fragment.flat]
        for key in self._kept:
            state.setdefault(key, torch.zeros_like(fragment.flat, requires_grad=False))
        if self._kind == "adam":
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=fragment.flat.device)

    # -- sizes

    def weight_bytes(self, names: Sequence[str]) -> tuple[int, int]:
        """(elements, bytes) that lie on this rank between steps, masters not counted."""
        parts = [self._parameters[name] if self._stage < 3 else self._parameters[name].ds_tensor for name in names]  # type: ignore[attr-defined]
        return sum(part.numel() for part in parts), sum(part.numel() * part.element_size() for part in parts)

    def gradient_bytes(self) -> int:
        """fp32 sums of this rank: of all that is trained with ZeRO-1, of what it updates otherwise."""
        if self._stage == 1:
            return 4 * sum(p.numel() for p in self._parameters.values() if p.requires_grad)
        return 4 * self._updated

    def state_bytes(self) -> int:
        """Masters and state of the rule on this rank, counted from the start."""
        return 4 * self._updated * (1 + len(self._kept))

    @property
    def _updated(self) -> int:
        """Elements that this rank updates, with what fills up its share."""
        if self._stage == 3:
            return sum(flat.numel() for flat in self._zero.fp32_partitioned_groups_flat)
        return sum(settings["params"][0].numel() for settings in self._rule.param_groups)

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and groups."""
        self.engine.destroy()
        self._library.close()


def _give_memory(model: TrainedModel, device: torch.device, library: Any, cut: dict[str, Any] | None) -> None:
    """Memory for the parameters; with `cut`, ZeRO-3's configuration, that of one whole block at a time."""
    for layer in blocks(model.inner) if cut is not None else ():
        allocate(layer, device)
        library.zero.Init(module=layer, config_dict_or_path=cut)
    allocate(model, device)
