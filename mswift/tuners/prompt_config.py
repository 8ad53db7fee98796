"""Fields of PEFT's prompts, from --tuner_config or a file: which there are, what they may be, whether they fit."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError
from mswift.tuners.prompts import PEFT_TYPES, PromptConfig

_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "prompt": {"num_virtual_tokens": 20, "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": ""},
    "ptuning": {
        "num_virtual_tokens": 20, "encoder_reparameterization_type": "MLP", "encoder_hidden_size": 0,
        "encoder_num_layers": 2,
    },
    "prefix": {"num_virtual_tokens": 20, "prefix_projection": False, "encoder_hidden_size": 0, "init_weights": ""},
}  # fmt: skip
"""Those of PEFT's configuration that may be set -> default; 0: as wide as a virtual token."""
_CHOICES = {
    "prompt_tuning_init": ("RANDOM", "SAMPLE_VOCAB", "TEXT"),
    "encoder_reparameterization_type": ("MLP", "LSTM"),
    "init_weights": ("", "zero"),
}
_BOOKKEEPING = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")
_START = ("encoder_dropout", "tokenizer_kwargs", "tokenizer_name_or_path")
"""Fields that PEFT writes too; they matter while training, or where it starts, and not to what a file holds."""


def prompt_config(table: ModelTable, kind: str, given: Mapping[str, Any], seed: int = 0) -> PromptConfig:
    """given: fields of --tuner_config. ConfigError for fields, values and models that do not fit."""
    _check_model(table, kind)
    if given.get("encoder_dropout"):
        raise ConfigError(
            f"--tuner_config: encoder_dropout {given['encoder_dropout']}: every rank would drop something else, and "
            "virtual tokens are the same on all: leave it out"
        )
    fields = _checked(kind, given, "--tuner_config: ")
    _check_pairs(kind, fields, given)
    return _of_model(table, kind, fields, seed)


def _of_model(table: ModelTable, kind: str, fields: Mapping[str, Any], seed: int) -> PromptConfig:
    spec = table.spec
    heads = spec.num_kv_heads if kind == "prefix" else spec.num_attention_heads
    width = spec.num_kv_heads * spec.head_dim if kind == "prefix" else spec.hidden_size
    if fields.get("encoder_hidden_size") == 0 and fields.get("prefix_projection", True):
        fields = {**fields, "encoder_hidden_size": width}
    return PromptConfig(kind, fields, width, spec.num_layers, heads, seed)


def _check_model(table: ModelTable, kind: str) -> None:
    spec = table.spec
    if spec.mamba is not None or spec.delta is not None:
        raise ConfigError(
            f"--tuner_type {kind}: model_type {spec.model_type!r} has recurrent layers: use --tuner_type lora"
        )
    if kind == "prefix" and spec.mla is not None:
        raise ConfigError(
            f"--tuner_type prefix: model_type {spec.model_type!r} makes the keys of all heads out of one latent "
            "vector, for which PEFT has no prefix: use --tuner_type prompt or ptuning"
        )


def _checked(kind: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All fields, of which each is right by itself."""
    fields = dict(_FIELDS[kind])
    for name, value in given.items():
        if name not in fields:
            near = get_close_matches(name, fields, 3, 0.5)
            known = f"near: {', '.join(near)}" if near else f"known: {' '.join(fields)}"
            raise ConfigError(f"{where}{kind} has no field {name!r}; {known}")
        wanted = type(fields[name])
        if type(value) is not wanted:
            words = {int: "a whole number", bool: "true or false", str: "a text"}
            raise ConfigError(f"{where}{name} {value!r} must be {words[wanted]}")
        fields[name] = value
    _check_values(fields, where)
    return fields


def _check_values(fields: Mapping[str, Any], where: str) -> None:
    for name in ("num_virtual_tokens", "encoder_num_layers"):
        if fields.get(name, 1) < 1:
            raise ConfigError(f"{where}{name} {fields[name]} must be at least 1")
    if fields.get("encoder_hidden_size", 0) < 0:
        raise ConfigError(f"{where}encoder_hidden_size {fields['encoder_hidden_size']} must not be negative")
    for name, known in _CHOICES.items():
        if name in fields and fields[name] not in known:
            raise ConfigError(f"{where}{name} {fields[name]!r}: known: {' '.join(filter(None, known))}")


def _check_pairs(kind: str, fields: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """ConfigError for fields of --tuner_config that do not go together."""
    where = "--tuner_config: "
    if kind == "prompt" and (fields["prompt_tuning_init"] == "TEXT") != bool(fields["prompt_tuning_init_text"]):
        raise ConfigError(
            f"{where}prompt_tuning_init TEXT and prompt_tuning_init_text go together: give both, or neither"
        )
    if kind == "prefix" and "encoder_hidden_size" in given and not fields["prefix_projection"]:
        raise ConfigError(f'{where}encoder_hidden_size has no effect without "prefix_projection": true')
    if fields.get("encoder_reparameterization_type") == "MLP" and fields["encoder_num_layers"] != 2:
        raise ConfigError(
            f"{where}encoder_num_layers {fields['encoder_num_layers']} is of an LSTM, the MLP has always the same "
            'layers: leave it out, or use "encoder_reparameterization_type": "LSTM"'
        )


def parse_prompt(data: Mapping[str, Any], path: Path, num_layers: int, seed: int = 0) -> PromptConfig:
    """The content of such an adapter_config.json, PEFT's own too; ConfigError for what is not carried.

    num_layers: of the model.
    """
    kind = {peft_type: kind for kind, peft_type in PEFT_TYPES.items()}[data["peft_type"]]
    model = {"num_layers", "num_attention_heads", "num_transformer_submodules", "token_dim"}
    known = {*_FIELDS[kind], *_BOOKKEEPING, *model, "peft_type", *_START}
    for name, value in data.items():
        if value and name not in known:
            raise ConfigError(f"{path}: {name}={value!r} is not supported by mswift for {data['peft_type']}")
    sizes = [data.get(name) for name in ("token_dim", "num_layers", "num_attention_heads")]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ConfigError(f"{path}: token_dim, num_layers and num_attention_heads {sizes} must be numbers")
    width, layers, heads = (int(size) for size in sizes if size is not None)
    if layers != num_layers or data.get("num_transformer_submodules") not in (1, None):
        raise ConfigError(
            f"{path}: num_layers {layers}, num_transformer_submodules {data.get('num_transformer_submodules')}: the "
            f"model has {num_layers} layers and one decoder"
        )
    given = {name: data[name] for name in _FIELDS[kind] if data.get(name) is not None}
    if kind == "prefix" and not given.get("prefix_projection"):
        given.pop("encoder_hidden_size", None)
    return PromptConfig(kind, _checked(kind, given, f"{path}: "), width, layers, heads, seed)


def check_continued(given: PromptConfig, there: PromptConfig, adapter: Path) -> None:
    """ConfigError unless flags (`given`) mean the adapter of --adapters (`there`), which a run can go on with."""
    if there.kind != given.kind:
        raise ConfigError(
            f"--tuner_type {given.kind}: --adapters {adapter} is {PEFT_TYPES[there.kind]}: use --tuner_type "
            f"{there.kind}"
        )
    if there.has_network:
        raise ConfigError(
            f"--adapters {adapter}: a file of {PEFT_TYPES[there.kind]} holds what its network made, not the network, "
            "which alone is trained: go on from the checkpoint of its run (--resume_from_checkpoint)"
        )
    check_fits(there, given, adapter)


def check_fits(there: PromptConfig, model: PromptConfig, adapter: Path) -> None:
    """ConfigError for an adapter of another model; `model`: one for the model at hand."""
    if (there.width, there.num_layers) != (model.width, model.num_layers):
        raise ConfigError(
            f"--adapters {adapter}: virtual tokens of width {there.width} for {there.num_layers} layers; the model has "
            f"{model.width} and {model.num_layers}: give the base model that it was trained on"
        )
