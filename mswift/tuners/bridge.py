"""Megatron-Bridge's names for adapters on Megatron's fused linears, and what of them depends on a layout there.

Read in its source (megatron.bridge.peft: lora, canonical_lora, dora_layers, utils): an adapter lies in a module
`adapter` of the linear, `linear_in` is A and `linear_out` is B; layers are stacked like the weights.

  fused (LoRA, DoRA)   decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight [L, R, i]
                                                            ....adapter.linear_out.weight [L, O, R], rows as the weight
                                                            ....adapter.weight_magnitude [L, O]
  canonical            decoder.layers.self_attention.linear_qkv.adapter.adapter_q.linear_in.weight ... (k, v, gate, up)

Two tensors of its files have rows in an order that depends on the tensor-parallel size of the run that wrote them:
the magnitude of linear_fc1, and B of adapter_gate and adapter_up (their rows are halved as if they were [gate; up]).
They are read where the chunks show that one rank wrote them, and never written.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mswift.converters.adapters import is_linear
from mswift.converters.megatron_tensor import MegatronTensor
from mswift.converters.plan import ModelTable
from mswift.converters.rule import Rule
from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.detect import RUN_CONFIG
from mswift.tuners.fused import Fusion

_CANONICAL = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": "gate", "up_proj": "up"}
_TARGETS = {"q": "linear_q", "k": "linear_k", "v": "linear_v", "gate": "linear_fc1_gate", "up": "linear_fc1_up"}
_CLASSES = {"LoRA": "fused", "DoRA": "fused", "CanonicalLoRA": "canonical"}


@dataclass(frozen=True)
class Slot:
    """One adapter module: `prefix` of its keys, the HF linears it serves, and how their rows lie in its B.

    target: its name in Bridge's target_modules. halved: its B, or (fused) its magnitude, is written in halves.
    """

    prefix: str
    tensor: MegatronTensor
    fusion: Fusion
    target: str
    halved: bool

    @property
    def key_a(self) -> str:
        return f"{self.prefix}.linear_in.weight"

    @property
    def key_b(self) -> str:
        return f"{self.prefix}.linear_out.weight"

    @property
    def key_magnitude(self) -> str:
        return f"{self.prefix}.weight_magnitude"

    def layers(self, table: ModelTable) -> list[int]:
        """HF numbers of its layers."""
        return [self.tensor.layer] if self.tensor.layer is not None else list(range(table.spec.num_layers))


def slots(table: ModelTable, layout: str) -> Iterator[Slot]:
    """The places for adapters in a model; experts and state-space layers are left out."""
    for tensor in table.megatron.values():
        rule = tensor.rule
        if not is_linear(rule) or rule.experts:
            continue
        base = tensor.key.removesuffix(".weight")
        leaves = [part.hf.split(".")[-2] for part in rule.parts]
        if not base.rpartition(".")[2].startswith("linear_"):
            continue  # in_proj of a state-space layer: Megatron-Bridge stores its B in five tensors
        fc1 = base.endswith("linear_fc1")
        if layout == "fused" or len(leaves) == 1:
            module = base.rpartition(".")[2]
            yield Slot(base + ".adapter", tensor, Fusion(rule, table.sizes), module, fc1 and len(leaves) > 1)
            continue
        for part, leaf in zip(rule.parts, leaves, strict=True):
            if leaf not in _CANONICAL:
                raise ConfigError(f"--adapter_layout canonical: Megatron-Bridge has no adapter for {leaf} of {base}")
            rows = part.of or f"{rule.units}*{part.rows}"
            alone = Rule("same", rule.megatron, (replace(part, rows=rows, start="0", step=1),), "one", rule.width)
            name = _CANONICAL[leaf]
            fusion = Fusion(alone, table.sizes)
            yield Slot(f"{base}.adapter.adapter_{name}", tensor, fusion, _TARGETS[name], fc1)


@dataclass(frozen=True)
class BridgePeft:
    """The `peft` section of a run_config.yaml: one rank and alpha for all."""

    layout: str
    dora: bool
    rank: int
    alpha: float
    dropout: float


def read_run_config(checkpoint: Path) -> BridgePeft:
    """From the checkpoint or the directory above it, where Megatron-Bridge has it; ConfigError if it is no LoRA's."""
    path = next((p for p in (checkpoint / RUN_CONFIG, checkpoint.parent / RUN_CONFIG) if p.is_file()), None)
    if path is None:
        raise ConfigError(
            f"--model {checkpoint}: neither {HINT} nor {RUN_CONFIG} beside the tensors says which alpha they have; "
            f"write {RUN_CONFIG} with `peft: {{_target_: megatron.bridge.peft.lora.LoRA, dim: R, alpha: ALPHA}}`"
        )
    try:
        section: Any = yaml.safe_load(path.read_text("utf-8"))["peft"]
        kind = str(section["_target_"]).rpartition(".")[2]
        rank, alpha, dropout = section["dim"], section["alpha"], section.get("dropout") or 0.0
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: its `peft` section gives no _target_, dim and alpha ({error!r})") from None
    if kind not in _CLASSES:
        raise ConfigError(
            f"{path}: peft._target_ {section['_target_']!r} is not supported; known: {' '.join(_CLASSES)}"
        )
    if type(rank) is not int or not isinstance(alpha, int | float) or not isinstance(dropout, int | float):
        raise CheckpointError(f"{path}: peft.dim={rank!r}, alpha={alpha!r}, dropout={dropout!r} must be numbers")
    return BridgePeft(_CLASSES[kind], kind == "DoRA", rank, alpha, float(dropout))


HINT = "hf/adapter_config.json"


def run_config(layout: str, dora: bool, rank: int, alpha: float, targets: list[str]) -> bytes:
    """A run_config.yaml with nothing but the `peft` section, from which Megatron-Bridge rebuilds the adapter."""
    place = {"canonical": "canonical_lora.CanonicalLoRA", "fused": "dora.DoRA" if dora else "lora.LoRA"}[layout]
    peft = {
        "_target_": f"megatron.bridge.peft.{place}",
        "target_modules": targets,
        "dim": rank,
        "alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "dropout": 0.0,
    }
    return (json.dumps({"peft": peft}, indent=1) + "\n").encode()  # JSON is YAML
