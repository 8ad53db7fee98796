"""PEFT directories written by mswift, judged by PEFT; directories written by PEFT, read by mswift."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mswift.converters.layout import Region
from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.adapter import PeftAdapter
from mswift.tuners.lora import LoraConfig, adapted
from mswift.tuners.peft_config import adapter_files
from mswift.tuners.settings import PeftSettings
from tests.support.adapters import (
    adapter_shapes,
    edit_config,
    load_peft,
    random_adapter,
    random_arrays,
    random_model,
    table_of,
    trained_parameters,
    write_arrays,
)

BOTH = ("embed_tokens", "lm_head")
SIZES = {"num_hidden_layers": 2, "vocab_size": 101}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    random_model(path / "untied", **SIZES)
    random_model(path / "tied", tie_word_embeddings=True, **SIZES)
    random_model(path / "qwen2", "qwen2", **SIZES)
    return path


def test_the_configuration_is_the_one_peft_writes(models: Path, tmp_path: Path) -> None:
    import peft

    table = table_of(models / "untied")
    theirs = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM",
        base_model_name_or_path="base", inference_mode=True,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    config = PeftSettings(rank=4, alpha=8, target_modules=("q_proj", "v_proj"))
    (content,) = adapter_files(table, config, ("lm_head",), "base").values()
    expected = json.loads((tmp_path / "adapter_config.json").read_text())
    expected["target_modules"].sort()
    assert json.loads(content) == expected


@pytest.mark.parametrize(
    ("model", "targets", "saved"),
    [
        ("untied", ("all-linear",), ()),
        ("untied", ("q_proj", "v_proj"), BOTH),
        ("untied", ("down_proj",), ("lm_head",)),
        ("tied", ("all-linear",), BOTH),
        ("tied", ("k_proj", "gate_proj"), ("embed_tokens",)),
        ("qwen2", ("all-linear",), ("embed_tokens",)),
    ],
)
def test_peft_loads_what_we_write(
    models: Path, tmp_path: Path, model: str, targets: tuple[str, ...], saved: tuple[str, ...]
) -> None:
    """No missing, no unexpected key, no warning; the values are ours, and PEFT trains the same parameters."""
    table = table_of(models / model)
    config = LoraConfig.for_table(table, rank=4, alpha=8, target_modules=targets, seed=0)
    arrays = random_arrays(table, config, saved)
    peft = load_peft(models / model, write_arrays(tmp_path / "a", table, config, arrays, saved), trainable=True)
    theirs = dict(trained_parameters(peft))
    assert theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        assert torch.equal(theirs[name], torch.from_numpy(array)), name
    assert peft.get_nb_trainable_parameters()[0] == sum(array.size for array in arrays.values())


def test_a_tied_matrix_serves_both_ends(models: Path, tmp_path: Path) -> None:
    """Logits of PEFT's model are those of the base with its one matrix replaced."""
    from transformers import AutoModelForCausalLM

    table = table_of(models / "tied")
    config = LoraConfig.for_table(table, rank=4, alpha=8, target_modules=["all-linear"], seed=0)
    arrays = random_arrays(table, config, BOTH)
    for name in arrays:
        if name.endswith("lora_B.weight"):
            arrays[name] *= 0
    write_arrays(tmp_path / "a", table, config, arrays, BOTH)
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    matrix = file["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(matrix, file["base_model.model.lm_head.weight"])
    base = AutoModelForCausalLM.from_pretrained(models / "tied", attn_implementation="eager")
    base.get_input_embeddings().weight.data.copy_(matrix)
    tokens = torch.arange(60)[None]
    ours, theirs = load_peft(models / "tied", tmp_path / "a")(tokens).logits, base(tokens).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"], r".*self_attn\.[qk]_proj"])
def test_we_read_what_peft_writes(models: Path, tmp_path: Path, targets: Any, saved: list[str] | None) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(models / "untied")
    config = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=saved, task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    table, adapter = table_of(models / "untied"), PeftAdapter(tmp_path)
    lora, kept = adapter.lora_config(table, seed=0)
    leaves = {"all-linear": ["all-linear"]}.get(targets, ["q_proj", "k_proj"]) if isinstance(targets, str) else targets
    meant = LoraConfig.for_table(table, rank=4, alpha=8, target_modules=leaves)
    assert adapted(table, lora) == adapted(table, meant)
    assert kept == tuple(saved or ())
    adapter.check(adapter_shapes(table, lora, kept))


def test_reading_a_region(models: Path, tmp_path: Path) -> None:
    adapter = PeftAdapter(random_adapter(tmp_path / "a", models / "untied"))
    name = "model.layers.1.mlp.down_proj.lora_A.weight"
    whole = adapter.tensor(name)
    assert torch.equal(adapter.read(name, Region((1, 24), (2, 48))), whole[1:3, 24:72])


def spoil(adapter: Path, change: Any) -> None:
    """Apply a change to the tensors of an adapter."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def check_against(adapter: Path, model: Path) -> None:
    """What the start of a training does with --adapters."""
    table, source = table_of(model), PeftAdapter(adapter)
    source.check(adapter_shapes(table, *source.lora_config(table, 0)))


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_A), rf"lacks {Q_A} \[4, 64\]"),
        (lambda t: t.update({Q_A: torch.zeros(3, 64)}), rf"{Q_A} has shape \[3, 64\], the model needs \[4, 64\]"),
        (lambda t: t.update({Q_A.replace(".0.", ".7."): torch.zeros(4, 64)}), r"layers\.7\..*has no place"),
        (lambda t: t.update({Q_A: torch.zeros(4, 64, dtype=torch.int8)}), "is I8"),
        (lambda t: t.update({"model.q.lora_A.weight": torch.zeros(4, 64)}), "does not begin with"),
    ],
)
def test_tensors_that_do_not_fit(models: Path, tmp_path: Path, change: Any, message: str) -> None:
    path = random_adapter(tmp_path / "a", models / "untied")
    spoil(path, change)
    with pytest.raises(CheckpointError, match=message):
        check_against(path, models / "untied")


def test_damaged_and_foreign_files(models: Path, tmp_path: Path) -> None:
    path = random_adapter(tmp_path / "a", models / "untied")
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is damaged"):
        PeftAdapter(path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"without adapter_model\.safetensors"):
        PeftAdapter(path)


def test_what_training_cannot_continue(models: Path, tmp_path: Path) -> None:
    """Each refusal's remedy works."""
    table = table_of(models / "tied")
    path = random_adapter(tmp_path / "a", models / "tied", modules_to_save=BOTH)
    edit_config(path, lora_dropout=0.05, use_dora=True)
    with pytest.raises(ConfigError, match=r"adapter_config.json: --use_dora with --lora_dropout .* leave one of them"):
        PeftAdapter(path).lora_config(table, 0)
    edit_config(path, lora_dropout=0.0, use_dora=False)
    assert PeftAdapter(path).lora_config(table, 0)
    spoil(path, lambda t: t["base_model.model.lm_head.weight"].add_(1))
    with pytest.raises(ConfigError, match=r"differ, but the model ties them.*mswift merge"):
        PeftAdapter(path).lora_config(table, 0)
