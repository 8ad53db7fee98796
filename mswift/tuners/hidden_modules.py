"""The modules of tuners that change hidden states, and how they are put into transformers' model: by forward hooks.

They compute in fp32, whatever the model does. Shapes: b rows, s positions, h hidden, m width or rank.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from mswift.errors import ConfigError
from mswift.tuners.hidden import PLACES, HiddenConfig

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip


class Bottleneck(nn.Module):
    """x + up(act(down(x))); up starts at zero, so that x stays x. x [b, s, h]."""

    def __init__(self, hidden: int, size: int, activation: str) -> None:
        super().__init__()
        self.active = True
        self.down, self.up = nn.Linear(hidden, size), nn.Linear(size, hidden)
        self._activation = _ACTIVATIONS[activation]

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """First values."""
        nn.init.xavier_uniform_(self.down.weight, generator=generator)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            tensor.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h], in the dtype of x."""
        change: Tensor = self.up(self._activation(self.down(x.float())))
        return x + change.to(x.dtype)


class LoReft(nn.Module):
    """h + R (W h + b - R' h), R [h, m] kept orthonormal by torch's parametrisation. Starts as pyreft starts it."""

    def __init__(self, hidden: int, rank: int) -> None:
        super().__init__()
        self.active = True
        self.source = nn.Linear(hidden, rank)
        self.rotate = nn.Linear(rank, hidden, bias=False)

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """First values: R any frame, W and b as of a linear."""
        bound = self.source.in_features**-0.5
        for tensor in (self.source.weight, self.source.bias):
            tensor.uniform_(-bound, bound, generator=generator)
        nn.init.orthogonal_(self.rotate.weight, generator=generator)
        orthogonal(self.rotate, orthogonal_map="householder", use_trivialization=False)  # else torch adds a [h, h] base
        for parameter in self.parameters():  # LAPACK leaves columns one after the other, checkpoints have rows
            parameter.data = parameter.data.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h], in the dtype of x."""
        h, rotation = x.float(), self.rotate.weight
        change: Tensor = (self.source(h) - h @ rotation) @ rotation.T
        return (h + change).to(x.dtype)


def attach(model: nn.Module, prefix: str, config: HiddenConfig, hidden: int) -> dict[str, nn.Parameter]:
    """Put the modules into layers `prefix`N of the model, on the CPU, with first values; their parameters by name.

    ConfigError where a layer lacks what an adapter stands behind.
    """
    made: dict[str, nn.Parameter] = {}
    for number in config.layers:
        layer = f"{prefix}{number}"
        places = [(layer, "reft")] if config.kind == "reft" else [(f"{layer}.{place}", "adapter") for place in PLACES]
        for place, leaf in places:
            try:
                parent = model.get_submodule(place)
            except AttributeError:
                raise ConfigError(
                    f"--tuner_type {config.kind}: {type(model).__name__} has no module {place}, behind which the "
                    "adapter would stand: use --tuner_type lora"
                ) from None
            name = f"{place}.{leaf}"
            with torch.device("cpu"):
                module = (
                    Bottleneck(hidden, config.size, config.activation)
                    if leaf == "adapter"
                    else LoReft(hidden, config.size)
                )
                module.float().start(_generator(config.seed, name))
            setattr(parent, leaf, module)
            parent.register_forward_hook(_behind(module))
            made |= dict(module.named_parameters(prefix=name))
    return made


def _behind(module: nn.Module) -> Callable[..., Any]:
    def changed(_parent: nn.Module, _inputs: Any, output: Any) -> Any:
        if not module.active:
            return output
        return module(output) if isinstance(output, Tensor) else (module(output[0]), *output[1:])

    return changed


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def set_active(model: nn.Module, active: bool) -> bool:
    """Switch the modules in a model on or off; whether there are any."""
    found = [module for module in model.modules() if isinstance(module, Bottleneck | LoReft)]
    for module in found:
        module.active = active
    return bool(found)
