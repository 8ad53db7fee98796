"""Prompt learning of PEFT: vectors, or keys and values, in front of every sequence. What an adapter holds; no torch.

    prompt    n vectors before the embedded tokens (PROMPT_TUNING; Lester et al. 2021, arXiv 2104.08691)
    ptuning   the same, made by a small network (P_TUNING; Liu et al. 2021, arXiv 2103.10385)
    prefix    n keys and values in every layer (PREFIX_TUNING; Li and Liang 2021, arXiv 2101.00190)

PEFT's file is one tensor, what a network made included; the network itself lies in checkpoints only.
Letters: n virtual tokens, h their width (prefix: of the keys of a layer), m width of the network, L layers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mswift.converters.plan import ModelTable

PEFT_TYPES: Mapping[str, str] = {"prompt": "PROMPT_TUNING", "ptuning": "P_TUNING", "prefix": "PREFIX_TUNING"}
"""Value of --tuner_type -> `peft_type`."""
PROMPTS = tuple(PEFT_TYPES)

EMBEDDINGS = "prompt_embeddings"
"""The tensor of PEFT's file."""
ENCODER = "prompt_encoder."
"""Begins the names of a network's tensors in checkpoints."""


@dataclass(frozen=True)
class PromptConfig:
    """fields: of PEFT's configuration, all that may be set; width: h; num_heads: PEFT's number of heads."""

    kind: str
    fields: Mapping[str, Any]
    width: int
    num_layers: int
    num_heads: int
    seed: int = 0

    @property
    def num_virtual_tokens(self) -> int:
        """n."""
        return int(self.fields["num_virtual_tokens"])

    @property
    def has_network(self) -> bool:
        """Whether what a file holds is made by a network, which the file does not hold."""
        return self.kind == "ptuning" or bool(self.fields.get("prefix_projection"))

    @property
    def _made(self) -> tuple[int, int]:
        return self.num_virtual_tokens, self.width * (2 * self.num_layers if self.kind == "prefix" else 1)

    def shapes(self, table: ModelTable | None = None) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint."""
        return self.trained_shapes() | {EMBEDDINGS: self._made}

    def trained_shapes(self, table: ModelTable | None = None) -> dict[str, tuple[int, ...]]:
        """Those of them that are trained, as PEFT's encoders call them."""
        if not self.has_network:
            return {EMBEDDINGS: self._made}
        h, m = self.width, self.fields["encoder_hidden_size"]
        if self.kind == "prefix":
            own = _linear("transform.0", h, m) | _linear("transform.2", m, self._made[1])
        elif self.fields["encoder_reparameterization_type"] == "MLP":
            own = _linear("mlp_head.0", h, m) | _linear("mlp_head.2", m, m) | _linear("mlp_head.4", m, h)
        else:
            own = _lstm(h, m, self.fields["encoder_num_layers"])
            own |= _linear("mlp_head.0", 2 * m, 2 * m) | _linear("mlp_head.2", 2 * m, h)
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.num_virtual_tokens, h), **own}
        return {ENCODER + name: shape for name, shape in shapes.items()}

    def file_shapes(self, table: ModelTable, modules_to_save: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Of PEFT's file."""
        assert not modules_to_save
        return {EMBEDDINGS: self._made}

    def content(self, base_model: str | None) -> dict[str, Any]:
        """Of adapter_config.json: what PEFT's configuration class takes."""
        own = {name: value for name, value in self.fields.items() if value is False or value}
        if own.get("prompt_tuning_init") == "TEXT":
            own["tokenizer_name_or_path"] = base_model or "."  # PEFT wants one, and does not open it
        common = {
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "num_attention_heads": self.num_heads,
            "num_layers": self.num_layers,
            "num_transformer_submodules": 1,
            "peft_type": PEFT_TYPES[self.kind],
            "task_type": "CAUSAL_LM",
            "token_dim": self.width,
        }
        return dict(sorted({**own, **common}.items()))

    def text(self, table: ModelTable, modules_to_save: Sequence[str], base_model: str | None) -> bytes:
        """The file adapter_config.json."""
        assert not modules_to_save
        return (json.dumps(self.content(base_model), indent=2) + "\n").encode()


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _lstm(inputs: int, hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Of torch's LSTM in both directions."""
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        width = inputs if layer == 0 else 2 * hidden
        own: dict[str, tuple[int, ...]] = {"weight_ih": (4 * hidden, width), "weight_hh": (4 * hidden, hidden)}
        own |= {"bias_ih": (4 * hidden,), "bias_hh": (4 * hidden,)}
        for end in (f"_l{layer}", f"_l{layer}_reverse"):
            found |= {f"lstm_head.{name}{end}": shape for name, shape in own.items()}
    return found


def is_prompt(data: Mapping[str, Any]) -> bool:
    """Whether the content of an adapter_config.json is of one of these."""
    return data.get("peft_type") in PEFT_TYPES.values()
