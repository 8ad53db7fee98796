"""X-LoRA (Buehler and Buehler 2024, arXiv 2402.07148): LoRAs mixed token by token by a classifier that is trained.

What such an adapter holds; no torch. A first pass of the frozen model gives hidden states, of which the classifier
makes a scale for every token and LoRA (and every linear, if `layerwise_scalings`); the second pass is the model's.

A directory has the classifier in PEFT's form, and the LoRAs in folders 0, 1, ... of it, each a PEFT directory.
Letters: h hidden size, m width of the classifier, n LoRAs, L linears that have one.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError
from mswift.tuners.peft_config import (
    CONFIG_FILE,
    parse_peft_config,
    peft_config,
    read_adapter_json,
)
from mswift.tuners.settings import PeftSettings
from mswift.tuners.shapes import STACKED, adapted_linears, adapted_parameters, in_spelling, promised_shapes

PEFT_TYPE = "XLORA"
CLASSIFIER = "internal_xlora_classifier"
"""PEFT's name of the classifier's module."""
STORED_CLASSIFIER = f"base_model.{CLASSIFIER}."
"""Begins the names of the classifier's tensors in PEFT's file."""
LORAS = "loras"
"""Key in a checkpoint's adapter_config.json: those of the LoRAs; a directory of PEFT has files of their own."""

FIELDS: Mapping[str, Any] = {
    "xlora_depth": 1, "xlora_size": 2048, "xlora_dropout_p": 0.2, "layerwise_scalings": False,
    "softmax_temperature": 1.0, "top_k_lora": 0, "enable_softmax": True, "enable_softmax_topk": False,
    "use_trainable_adapters": False, "scaling_pass_value": 0.0, "global_scaling_weight": 1.0,
}  # fmt: skip
"""Those of PEFT's configuration that may be set -> default; top_k_lora 0: all (PEFT's None)."""
_OTHER_ROWS = re.compile(r"\.(kv_b_proj|shared_expert(_gate)?)(\.|$)")
"""In names of linears that transformers computes for all that is cached, or for the tokens of all rows as one."""
BOOKKEEPING = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")


@dataclass(frozen=True)
class XloraConfig:
    """fields: of PEFT's configuration, all of `FIELDS`; loras: what is mixed, in order; hidden_size: h."""

    fields: Mapping[str, Any]
    loras: tuple[PeftSettings, ...]
    hidden_size: int
    seed: int = 0

    def linears(self, table: ModelTable) -> frozenset[str]:
        """Names of those with a LoRA. ConfigError for one that cannot be mixed."""
        return frozenset(name for lora in self.loras for name in _linears(table, lora))

    def classifier_shapes(self, table: ModelTable) -> dict[str, tuple[int, ...]]:
        """Tensors of the classifier, as PEFT's file has them."""
        fields, inputs = self.fields, self.hidden_size
        outputs = len(self.loras) * (len(self.linears(table)) if fields["layerwise_scalings"] else 1)
        widths = [*[fields["xlora_size"]] * (fields["xlora_depth"] - 1), outputs]
        shapes: dict[str, tuple[int, ...]] = {}
        for number, width in enumerate(widths):
            place = number * (3 if fields["xlora_dropout_p"] else 2)  # activation, and dropout if there is some
            shapes |= {
                f"{STORED_CLASSIFIER}layers.{place}.weight": (width, inputs),
                f"{STORED_CLASSIFIER}layers.{place}.bias": (width,),
            }
            inputs = width
        return shapes

    def lora_shapes(self, table: ModelTable) -> dict[str, tuple[int, ...]]:
        """Tensors of the LoRAs, `<number>.<PEFT's name>`."""
        return {
            f"{number}.{name}": shape
            for number, lora in enumerate(self.loras)
            for name, shape in promised_shapes(own_table(table), lora).items()
        }

    def shapes(self, table: ModelTable) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint, and of a directory."""
        return self.classifier_shapes(table) | self.lora_shapes(table)

    def trained_shapes(self, table: ModelTable) -> dict[str, tuple[int, ...]]:
        """Those of them that are trained."""
        return self.shapes(table) if self.fields["use_trainable_adapters"] else self.classifier_shapes(table)

    def file_shapes(self, table: ModelTable, modules_to_save: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """As `shapes`."""
        assert not modules_to_save
        return self.shapes(table)

    def content(self, base_model: str | None = None) -> dict[str, Any]:
        """Of a checkpoint's adapter_config.json; `directory_configs` makes those of a directory of it."""
        own = {**self.fields, "top_k_lora": self.fields["top_k_lora"] or None}
        common = {
            "base_model_name_or_path": base_model,
            "hidden_size": self.hidden_size,
            "inference_mode": True,
            LORAS: [peft_config(lora, (), base_model=None, tied=False) for lora in self.loras],
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
        }
        return dict(sorted({**own, **common}.items()))

    def text(self, table: ModelTable, modules_to_save: Sequence[str], base_model: str | None) -> bytes:
        """The file adapter_config.json of a checkpoint."""
        assert not modules_to_save
        return json_text(self.content(base_model))


def own_table(table: ModelTable) -> ModelTable:
    """The table as transformers' model has experts."""
    return in_spelling(table, STACKED)


def _linears(table: ModelTable, lora: PeftSettings) -> list[str]:
    """Names of the linears of one LoRA; ConfigError for a LoRA of another kind than PEFT mixes."""
    own = own_table(table)
    parameters, linears = adapted_parameters(own, lora), [linear.name for linear in adapted_linears(own, lora)]
    odd = next((name for name in linears if _OTHER_ROWS.search(name)), "")
    kinds = {
        "is a DoRA": lora.dora,
        "has biases (lora_bias)": lora.lora_bias,
        f"replaces {' '.join(lora.modules_to_save)} (modules_to_save)": bool(lora.modules_to_save),
        f"adapts {next(iter(parameters.values())).name if parameters else ''}, which is no linear": bool(parameters),
        f"adapts {odd}, whose inputs are not one for each token of a row": bool(odd),
    }
    for what in (what for what, is_so in kinds.items() if is_so):
        raise ConfigError(f"{lora.path}: it {what}, and X-LoRA mixes LoRAs of linears alone: train one without that")
    promised_shapes(own, lora)  # refuses one that is for nothing in the model
    return linears


def xlora_config(table: ModelTable, given: Mapping[str, Any], paths: Sequence[str], seed: int = 0) -> XloraConfig:
    """given: fields of --tuner_config; paths: PEFT directories of LoRAs. ConfigError for what does not fit."""
    flag = "--xlora_adapters"
    if not paths:
        raise ConfigError(f"--tuner_type xlora mixes LoRAs that were trained before: name them, {flag} DIR DIR ...")
    loras = tuple(parse_peft_config(read_adapter_json(p, flag), p / CONFIG_FILE) for p in map(Path, paths))
    where = "--tuner_config: "
    fields = checked_fields(given, where)
    check_pairs(fields, given, len(loras), where)
    made = XloraConfig(fields, loras, table.spec.hidden_size, seed)
    made.linears(table)
    return made


def checked_fields(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All fields, of which each is right by itself."""
    fields = dict(FIELDS)
    for name, value in given.items():
        if name not in fields:
            near = get_close_matches(name, fields, 3, 0.5)
            known = f"near: {', '.join(near)}" if near else f"known: {' '.join(fields)}"
            raise ConfigError(f"{where}xlora has no field {name!r}; {known}")
        default = fields[name]
        is_number = type(default) is float and type(value) in (int, float) and math.isfinite(value)
        if type(value) is not type(default) and not is_number:
            words = {int: "a whole number", bool: "true or false", float: "a number"}
            raise ConfigError(f"{where}{name} {value!r} must be {words[type(default)]}")
        fields[name] = float(value) if type(default) is float else value
    for name, least in (("xlora_depth", 1), ("xlora_size", 1), ("top_k_lora", 0)):
        if fields[name] < least:
            raise ConfigError(f"{where}{name} {fields[name]} must be at least {least}")
    if not 0 <= fields["xlora_dropout_p"] < 1:
        raise ConfigError(f"{where}xlora_dropout_p {fields['xlora_dropout_p']:g} must be at least 0 and below 1")
    if not fields["softmax_temperature"] > 0:
        raise ConfigError(f"{where}softmax_temperature {fields['softmax_temperature']:g} must be above 0")
    return fields


def check_pairs(fields: Mapping[str, Any], given: Mapping[str, Any], count: int, where: str) -> None:
    """ConfigError for fields that do not go together, or not with this number of LoRAs."""
    if fields["top_k_lora"] > count:
        raise ConfigError(f"{where}top_k_lora {fields['top_k_lora']} of {count} LoRAs: use {count} or less")
    if fields["enable_softmax_topk"] and not fields["top_k_lora"]:
        raise ConfigError(f"{where}enable_softmax_topk is over the top_k_lora largest scales: give top_k_lora too")
    if fields["xlora_depth"] == 1:
        for name in ("xlora_size", "xlora_dropout_p"):
            if given.get(name):
                raise ConfigError(f"{where}{name} {given[name]} has no effect with xlora_depth 1, one linear")


def check_choice(made: XloraConfig, paths: Sequence[str]) -> None:
    """ConfigError where the classifier has no choice: of equal LoRAs all of a softmax's scales compute the same."""
    fields = made.fields
    is_same = len({Path(path).resolve() for path in paths}) == 1 and (len(paths) == 1 or not fields["top_k_lora"])
    if is_same and fields["enable_softmax"] and not fields["use_trainable_adapters"]:
        raise ConfigError(
            f"--xlora_adapters {' '.join(paths)}: the scales of a softmax sum to 1, so that of one LoRA nothing would "
            "be learned: name two different ones or more, or give --tuner_config '{\"enable_softmax\": false}'"
        )


def check_fits(there: XloraConfig, table: ModelTable, adapter: Path) -> None:
    """ConfigError for an adapter of another model."""
    if there.hidden_size != table.spec.hidden_size:
        raise ConfigError(
            f"--adapters {adapter}: its classifier reads {there.hidden_size} hidden features, the model has "
            f"{table.spec.hidden_size}: give the base model that it was trained on"
        )
    there.linears(table)


def json_text(content: Mapping[str, Any]) -> bytes:
    """As a file has it."""
    return (json.dumps(content, indent=2) + "\n").encode()
