"""LISA on the engine of transformers models: which layers have gradients and optimizer state now."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mswift.parallel.fsdp.model import blocks
from mswift.tuners.lisa import LayerSampling


def layers_of(model: nn.Module) -> dict[str, int]:
    """Name of each parameter in a layer -> number of the layer."""
    number_of = {id(block): number for number, block in enumerate(blocks(model))}
    inside = [(name, number_of[id(module)]) for name, module in model.named_modules() if id(module) in number_of]
    return {
        name: number
        for prefix, number in inside
        for name, _ in model.get_submodule(prefix).named_parameters(prefix=prefix)
    }


class SampledLayers:
    """Before a forward pass that is trained, layers of other choices lose gradients and optimizer state."""

    def __init__(
        self,
        sampling: LayerSampling,
        layer_of: Mapping[str, int],
        parameters: Mapping[str, Tensor],
        drop: Callable[[str], None],
    ) -> None:
        """parameters: those that are trained, by name; drop: lets go of the optimizer state of one."""
        self._sampling, self._drop = sampling, drop
        self._layers = {name: (layer_of[name], parameter) for name, parameter in parameters.items() if name in layer_of}

    def attach(self, model: nn.Module, update: Callable[[], int]) -> None:
        """Follow the forward passes of `model`, to be called once it is sharded; update: number of the next one.

        FSDP2's own hook comes first: the first pass fixes the dtype of each layer's reduction, for which the layer
        must have parameters that are trained.
        """

        def choose(_module: nn.Module, _inputs: Any) -> None:
            if torch.is_grad_enabled():
                self._choose(update())

        model.register_forward_pre_hook(choose)

    def _choose(self, update: int) -> None:
        active = self._sampling.active_at(update)
        for name, (layer, parameter) in self._layers.items():
            if parameter.requires_grad != (layer in active):
                parameter.requires_grad_(layer in active)
                if layer not in active:
                    self._drop(name)

    def updates_of(self, name: str, done: int) -> int:
        """Updates that the optimizer state of a parameter has seen after `done` of the run; 0: it has none."""
        return self._sampling.updates_of(self._layers[name][0], done) if name in self._layers else done

    def idle(self, update: int) -> set[str]:
        """Parameters that this update does not change."""
        active = self._sampling.active_at(update)
        return {name for name, (layer, _) in self._layers.items() if layer not in active}
