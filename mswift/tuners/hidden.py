"""Tuners that change hidden states in place of weights: Houlsby's adapters and LoReFT. What they hold; no torch.

    adapter   x + up(act(down(x))) behind attention and MLP of a layer, before the residual (arXiv 1902.00751)
    reft      h + R (W h + b - R' h) behind a layer, the columns of R orthonormal (LoReFT, arXiv 2404.03592)

Names are those of the parameters in transformers' model. The file beside them is an adapter_config.json whose
`peft_type` PEFT does not know, so that no program takes them for adapters of weights.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError

PEFT_TYPES: Mapping[str, str] = {"adapter": "ADAPTER", "reft": "REFT"}
"""Value of --tuner_type -> `peft_type`."""

HIDDEN = tuple(PEFT_TYPES)

ACTIVATIONS = ("gelu", "relu", "silu", "tanh")
PLACES = ("self_attn", "mlp")
"""Modules of a layer behind which an adapter stands."""

FRAME = "rotate.parametrizations.weight.original"
"""What torch's orthogonal parametrisation keeps of a frame."""


@dataclass(frozen=True)
class HiddenConfig:
    """size: width of an adapter, rank of LoReFT; layers: numbers of those that have one, in their order."""

    kind: str
    size: int
    layers: tuple[int, ...]
    activation: str = "gelu"
    seed: int = 0

    def shapes(self, table: ModelTable) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all that is trained; letters: m size, h hidden."""
        m, h = self.size, table.spec.hidden_size
        own: dict[str, tuple[int, ...]]
        if self.kind == "reft":
            own = {f"reft.{FRAME}": (h, m), "reft.source.weight": (m, h), "reft.source.bias": (m,)}
        else:
            one = {"down.weight": (m, h), "down.bias": (m,), "up.weight": (h, m), "up.bias": (h,)}
            own = {f"{place}.adapter.{name}": shape for place in PLACES for name, shape in one.items()}
        return {f"{layer_prefix(table)}{n}.{name}": shape for n in self.layers for name, shape in own.items()}

    def trained_shapes(self, table: ModelTable) -> dict[str, tuple[int, ...]]:
        """As `shapes`: nothing stays as it is."""
        return self.shapes(table)

    def file_shapes(self, table: ModelTable, modules_to_save: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """As `shapes`: no module is trained beside."""
        assert not modules_to_save
        return self.shapes(table)

    def content(self, base_model: str | None) -> dict[str, Any]:
        """Of adapter_config.json; fields are flags of a run."""
        own: dict[str, Any] = {"reft_rank": self.size, "reft_layers": list(self.layers)}
        if self.kind == "adapter":
            own = {"adapter_length": self.size, "adapter_act": self.activation}
        return {"peft_type": PEFT_TYPES[self.kind], "base_model_name_or_path": base_model, **own}

    def text(self, table: ModelTable, modules_to_save: Sequence[str], base_model: str | None) -> bytes:
        """The file."""
        assert not modules_to_save
        return (json.dumps(self.content(base_model), indent=2, sort_keys=True) + "\n").encode()


def hidden_config(
    table: ModelTable, kind: str, size: int, layers: tuple[int, ...], activation: str = "gelu", seed: int = 0
) -> HiddenConfig:
    """As the flags say it; no layers: all. ConfigError for numbers that do not fit the model."""
    count, flag = table.spec.num_layers, {"adapter": "adapter_length", "reft": "reft_rank"}[kind]
    for layer in layers:
        if not 0 <= layer < count:
            raise ConfigError(f"--reft_layers {layer}: the model has layers 0 to {count - 1}: use some of these")
    if kind == "reft" and size >= table.spec.hidden_size:
        raise ConfigError(
            f"--{flag} {size} of hidden states of {table.spec.hidden_size}: use --{flag} {table.spec.hidden_size - 1} "
            "or less; 4 is usual"
        )
    if table.spec.mamba is not None or table.spec.delta is not None:
        raise ConfigError(f"--tuner_type {kind}: model_type {table.spec.model_type!r} has recurrent layers: use full")
    chosen = tuple(sorted(set(layers))) or tuple(range(count))
    return HiddenConfig(kind, size, chosen, activation, seed)


def layer_prefix(table: ModelTable) -> str:
    """What HF names of layers begin with: "model.layers."."""
    rule = next(tensor.rule for tensor in table.megatron.values() if tensor.rule.in_layer)
    return rule.parts[0].hf.partition("{l}")[0]


def is_hidden(data: Mapping[str, Any]) -> bool:
    """Whether the content of an adapter_config.json is of one of these."""
    return data.get("peft_type") in PEFT_TYPES.values()


def parse_hidden(data: Mapping[str, Any], path: Path, num_layers: int, seed: int = 0) -> HiddenConfig:
    """The content of such an adapter_config.json; ConfigError for one that was not written here.

    num_layers: of the model.
    """
    kind = {peft_type: kind for kind, peft_type in PEFT_TYPES.items()}[data["peft_type"]]
    size, activation = data.get(f"{kind}_{'length' if kind == 'adapter' else 'rank'}"), data.get("adapter_act", "gelu")
    layers = data.get("reft_layers", list(range(num_layers)))
    right = type(size) is int and size > 0 and activation in ACTIVATIONS and isinstance(layers, list)
    right = right and all(type(layer) is int and 0 <= layer < num_layers for layer in layers)
    made = HiddenConfig(kind, size or 1, tuple(layers) if right else (), activation, seed)
    if not right or data.keys() != made.content(None).keys():
        raise ConfigError(
            f"{path} is not what mswift export writes for {PEFT_TYPES[kind]} of a model with {num_layers} layers: "
            f"{dict(data)}"
        )
    return made
