"""Prompt learning without torch: counts by the published formulas, what a file says, what is refused."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mswift.config.train import SftConfig
from mswift.converters.plan import table_for
from mswift.errors import ConfigError
from mswift.refusals import train_refusals
from mswift.train.trained import trained_parameters
from mswift.tuners.other_adapters import check_prompt
from mswift.tuners.peft_config import parse_peft_config
from mswift.tuners.prompt_config import parse_prompt, prompt_config
from mswift.tuners.prompts import PROMPTS, is_prompt
from tests.support.family_configs import family_config

TABLE = table_for(family_config("llama"))
LAYERS, HIDDEN, KEYS = 3, 32, 16
"""Of the tiny Llama; keys: of all heads of a layer."""
FINE = SftConfig(model="m", dataset=("a.jsonl",), train_iters=1, backend="fsdp")


def run(kind: str, **fields: Any) -> SftConfig:
    text = json.dumps(fields) if fields else None
    return dataclasses.replace(FINE, tuner_type=kind, tuner_config=text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (run("prompt"), 20 * HIDDEN),
        (run("ptuning", num_virtual_tokens=4), 4 * HIDDEN + 3 * (HIDDEN * HIDDEN + HIDDEN)),
        (
            run("ptuning", encoder_reparameterization_type="LSTM", encoder_hidden_size=5, encoder_num_layers=2),
            20 * HIDDEN + 2 * 4 * 5 * (HIDDEN + 5 + 2) + 2 * 4 * 5 * (10 + 5 + 2) + 10 * 10 + 10 + HIDDEN * 10 + HIDDEN,
        ),
        (run("prefix"), 20 * 2 * LAYERS * KEYS),
        (
            run("prefix", prefix_projection=True, encoder_hidden_size=7),
            20 * KEYS + 7 * KEYS + 7 + 2 * LAYERS * KEYS * 7 + 2 * LAYERS * KEYS,
        ),
    ],
)
def test_trained_parameters(config: SftConfig, count: int) -> None:
    assert trained_parameters(config, TABLE) == count
    assert train_refusals(config, TABLE.spec, 2) == []


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_configuration_is_read_as_it_is_written(kind: str) -> None:
    own = prompt_config(TABLE, kind, {"num_virtual_tokens": 3}, 5)
    data = json.loads(own.text(TABLE, (), "base"))
    assert is_prompt(data)
    assert parse_prompt(data, Path("f"), LAYERS, 5) == own


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("ptuning", {"encoder_num_layers": 3, "encoder_dropout": 0.1}),
        ("ptuning", {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.1}),
        ("prompt", {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": "Say"}),
        ("prompt", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Say", "tokenizer_kwargs": {"a": 1}}),
        ("prefix", {"encoder_hidden_size": 8}),
    ],
)
def test_files_with_fields_that_matter_to_training_alone_are_read(kind: str, fields: dict[str, Any]) -> None:
    data = prompt_config(TABLE, kind, {}).content("base") | fields
    read = parse_prompt(data, Path("f"), LAYERS)
    assert read.file_shapes(TABLE, ()) == prompt_config(TABLE, kind, {}).file_shapes(TABLE, ())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_virtual_tokens": 0}, "f: num_virtual_tokens 0 must be at least 1"),
        ({"num_virtual_tokens": "3"}, "f: num_virtual_tokens '3' must be a whole number"),
        ({"prompt_tuning_init": "WORDS"}, "f: prompt_tuning_init 'WORDS': known: "),
        ({"modules_to_save": ["lm_head"]}, "f: modules_to_save=.'lm_head'. is not supported"),
        ({"token_dim": 0}, "token_dim, num_layers and num_attention_heads .0, 3, 8. must be numbers"),
    ],
)
def test_files_that_do_not_say_what_they_hold_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_prompt(prompt_config(TABLE, "prompt", {}).content("base") | fields, Path("f"), LAYERS)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown field": ("prompt", {"num_virtual_token": 3}, "prompt has no field 'num_virtual_token'; near: num_virtual"),
    "field of another": ("prefix", {"prompt_tuning_init": "RANDOM"}, "prefix has no field 'prompt_tuning_init'; known"),
    "type": ("prompt", {"num_virtual_tokens": True}, "num_virtual_tokens True must be a whole number"),
    "none": ("prefix", {"num_virtual_tokens": 0}, "num_virtual_tokens 0 must be at least 1"),
    "start": ("prompt", {"prompt_tuning_init": "WORDS"}, "prompt_tuning_init 'WORDS': known: RANDOM SAMPLE_VOCAB TEXT"),
    "text without": ("prompt", {"prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text go together"),
    "text alone": ("prompt", {"prompt_tuning_init_text": "Say"}, "prompt_tuning_init_text go together"),
    "dropout": ("ptuning", {"encoder_dropout": 0.1}, "encoder_dropout 0.1: every rank would drop something else"),
    "layers of an MLP": ("ptuning", {"encoder_num_layers": 3}, "encoder_num_layers 3 is of an LSTM"),
    "no projection": ("prefix", {"encoder_hidden_size": 8}, 'no effect without "prefix_projection": true'),
    "width": ("ptuning", {"encoder_hidden_size": -1}, "encoder_hidden_size -1 must not be negative"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fields_that_do_not_fit_are_refused(case: str) -> None:
    kind, fields, text = REFUSED[case]
    with pytest.raises(ConfigError, match=text):
        trained_parameters(run(kind, **fields), TABLE)


@pytest.mark.parametrize(
    ("kind", "family", "text"),
    [
        ("prefix", "deepseek_v3", "makes the keys of all heads out of one latent vector.*use --tuner_type prompt"),
        ("prompt", "qwen3_next", "model_type 'qwen3_next' has recurrent layers: use --tuner_type lora"),
    ],
)
def test_models_that_it_is_not_for_are_refused(kind: str, family: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        trained_parameters(run(kind), table_for(family_config(family)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"backend": "megatron"}, "is computed by PEFT on transformers' model: use --backend fsdp"),
        ({"lora_rank": 4}, "--lora_rank 4 has no effect with --tuner_type prompt"),
        ({"target_modules": ("q_proj",)}, "--target_modules q_proj has no effect with --tuner_type prompt"),
        ({"modules_to_save": ("lm_head",)}, "--modules_to_save lm_head has no effect with --tuner_type prompt"),
        ({"neftune_noise_alpha": 5.0}, "--neftune_noise_alpha 5.0 with --tuner_type prompt: the noise would be on"),
        ({"new_special_tokens": ("<a>",)}, "--new_special_tokens <a> with --tuner_type prompt"),
        ({"optimizer": "muon"}, "--optimizer muon is for the matrices of a model that is trained in full"),
        ({"adapters": ("a", "b")}, "--adapters names 2 adapters"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(change: dict[str, Any], text: str) -> None:
    found = [str(refusal) for refusal in train_refusals(dataclasses.replace(run("prompt"), **change), TABLE.spec, 1)]
    assert any(text in refusal for refusal in found), found


def test_only_vectors_that_are_trained_themselves_are_continued(tmp_path: Path) -> None:
    def write(kind: str, **fields: Any) -> None:
        (tmp_path / "adapter_config.json").write_bytes(prompt_config(TABLE, kind, fields).text(TABLE, (), None))

    write("prompt", num_virtual_tokens=3)
    check_prompt(run("prompt"), TABLE, tmp_path)
    with pytest.raises(ConfigError, match="is PROMPT_TUNING: use --tuner_type prompt"):
        check_prompt(run("prefix"), TABLE, tmp_path)
    with pytest.raises(ConfigError, match="--tuner_config with --adapters .* leave it out"):
        check_prompt(run("prompt", num_virtual_tokens=3), TABLE, tmp_path)
    write("ptuning")
    with pytest.raises(ConfigError, match="holds what its network made, not the network"):
        check_prompt(run("ptuning"), TABLE, tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(prompt_config(TABLE, "prompt", {}).content(None) | {"token_dim": 8})
    )
    with pytest.raises(ConfigError, match="width 8 for 3 layers; the model has 32 and 3"):
        check_prompt(run("prompt"), TABLE, tmp_path)


def test_what_takes_lora_only_says_who_serves_it() -> None:
    with pytest.raises(
        ConfigError, match="'P_TUNING' puts virtual tokens .* serve it with --infer_backend transformers"
    ):
        parse_peft_config(prompt_config(TABLE, "ptuning", {}).content(None), Path("f"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"backend": "megatron"}, "--init_weights eva is computed on transformers' model: use --backend fsdp"),
        ({"streaming": True}, "--init_weights eva with --streaming"),
        ({"torch_compile": True}, "--init_weights eva with --torch_compile"),
        ({"tuner_type": "longlora"}, "--init_weights eva with --tuner_type longlora is not computed"),
        ({"init_batches": 0}, "--init_batches 0 must be at least 1"),
        ({"lora_ga_scale": "unit"}, "--lora_ga_scale unit has no effect with --init_weights eva: use .* lora_ga"),
        ({"init_weights": "true", "init_batches": 4}, "--init_batches 4 has no effect with --init_weights true"),
        ({"init_weights": "lora-ga"}, "--init_weights lora-ga: known: .* eva lora_ga"),
        ({"tuner_type": "hra", "init_weights": "true", "init_batches": 4}, "--init_batches 4 has no effect"),
    ],
)
def test_starts_from_data_go_with_lora_on_transformers_model_alone(change: dict[str, Any], text: str) -> None:
    config = dataclasses.replace(FINE, tuner_type="lora", init_weights="eva")
    assert train_refusals(config, TABLE.spec, 1) == []
    changed = dataclasses.replace(config, **change)
    found = [str(refusal) for refusal in train_refusals(changed, TABLE.spec, 1)]
    try:
        trained_parameters(changed, TABLE)
    except ConfigError as error:
        found.append(str(error))
    assert any(re.search(text, refusal) for refusal in found), found
