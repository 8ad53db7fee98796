"""A run that goes on with an adapter trains that one, and flags that ask for another are refused."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest

from mswift.config.train import SftConfig
from mswift.converters.plan import ModelTable, table_for
from mswift.errors import ConfigError
from mswift.train.continued import check_continued
from mswift.train.dry_run_rows import model_rows
from mswift.train.trained import optimizer_bytes, trained_parameters
from mswift.tuners.files import write_safetensors
from mswift.tuners.lora import LoraConfig
from mswift.tuners.method import MethodConfig
from mswift.tuners.peft_config import CONFIG_FILE, PREFIX, WEIGHTS_FILE, adapter_files
from mswift.tuners.shapes import promised_shapes
from tests.support.family_configs import family_config

LORA = "lora"
SAVED = ("embed_tokens", "lm_head")


def config(adapter: Path, tuner: str, **flags: Any) -> SftConfig:
    return SftConfig(
        model="m", dataset=("a",), train_iters=1, backend="fsdp", tuner_type=tuner, adapters=(str(adapter),), **flags
    )  # type: ignore[arg-type]


def table() -> ModelTable:
    return table_for(family_config("qwen2"))


def written(folder: Path, tuner: str, saved: tuple[str, ...] = ()) -> Path:
    """An adapter of rank 4 on q_proj, all of it zero."""
    folder.mkdir()
    if tuner == LORA:
        lora = LoraConfig.for_table(table(), rank=4, alpha=8, target_modules=["q_proj"], dropout=0.1)
        content = json.loads(adapter_files(table(), lora.settings, saved, None)[CONFIG_FILE])
        shapes = promised_shapes(table(), lora.settings)
    else:
        method = MethodConfig.for_table(table(), tuner, target_modules=["q_proj"], fields={"r": 4})
        content, shapes = method.content(table(), saved), method.shapes(table())
    (folder / CONFIG_FILE).write_text(json.dumps(content))
    zeros = {PREFIX + name: ("F32", shape) for name, shape in shapes.items()}
    write_safetensors(folder / WEIGHTS_FILE, zeros, lambda name: [bytearray(4 * prod(zeros[name][1]))])
    return folder


@pytest.mark.parametrize(
    ("tuner", "flags", "text"),
    [
        (LORA, {"lora_rank": 16}, "--lora_rank 16: .* has 4, .* use --lora_rank 4"),
        (LORA, {"lora_alpha": 16.0}, "--lora_alpha 16: .* has 8"),
        (LORA, {"lora_dropout": 0.2}, "--lora_dropout 0.2: .* has 0.1, .* use --lora_dropout 0.1"),
        (LORA, {"target_modules": ("q_proj", "k_proj")}, "--target_modules q_proj k_proj: .* has q_proj, .* leave it"),
        (LORA, {"modules_to_save": ("embed_tokens",)}, "--modules_to_save embed_tokens: .* has none, .* leave it out"),
        ("hra", {"lora_rank": 16}, "--lora_rank 16: .* has 4"),
        ("hra", {"target_modules": ("k_proj",)}, "--target_modules with --adapters .* leave it out"),
        ("hra", {"modules_to_save": ("lm_head",)}, "--modules_to_save with --adapters .* leave it out"),
        ("hra", {"tuner_config": '{"r": 2}'}, "--tuner_config with --adapters .* leave it out"),
    ],
)
def test_flags_of_another_adapter_are_refused(tmp_path: Path, tuner: str, flags: dict[str, Any], text: str) -> None:
    adapter = written(tmp_path / "a", tuner)
    check_continued(config(adapter, tuner), table(), adapter, grows=False)
    with pytest.raises(ConfigError, match=text):
        check_continued(config(adapter, tuner, **flags), table(), adapter, grows=False)


@pytest.mark.parametrize("tuner", [LORA, "hra"])
def test_rows_of_new_tokens_need_an_adapter_that_trains_them(tmp_path: Path, tuner: str) -> None:
    new = {"new_special_tokens": ("<x>",)}
    adapter, full = written(tmp_path / "a", tuner), written(tmp_path / "full", tuner, SAVED)
    check_continued(config(full, tuner, **new), table(), full, grows=True)
    check_continued(config(adapter, tuner, **new), table(), adapter, grows=False)  # the tokenizer has them
    with pytest.raises(ConfigError, match="--new_special_tokens <x>: their rows would stay .* has no embed_tokens and"):
        check_continued(config(adapter, tuner, **new), table(), adapter, grows=True)


def test_flags_that_say_what_is_there_are_taken(tmp_path: Path) -> None:
    adapter = written(tmp_path / "a", LORA, SAVED)
    own = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ("q_proj",)}
    check_continued(config(adapter, LORA, **own, modules_to_save=("embed_tokens",)), table(), adapter, grows=False)


@pytest.mark.parametrize("tuner", [LORA, "hra"])
def test_what_is_counted_is_the_adapter_that_goes_on(tmp_path: Path, tuner: str) -> None:
    """Not one that the flags would make; embeddings that are tied are one matrix."""
    model, width = table(), table().spec.hidden_size
    alone = model.spec.num_layers * 4 * (2 * width if tuner == LORA else width)
    assert model.hf["model.layers.0.self_attn.q_proj.weight"] == (width, width)
    saved = prod(model.hf["model.embed_tokens.weight"])
    assert trained_parameters(config(written(tmp_path / "a", tuner), tuner), model) == alone
    both = config(written(tmp_path / "b", tuner, SAVED), tuner)
    assert trained_parameters(both, model) == alone + saved
    assert optimizer_bytes(both, model) == 8 * (alone + saved)
    rows = dict(model_rows(both, Path("m"), model, 0, has_weights=True))
    assert rows["tuner"] == f"{tuner}, {tmp_path / 'b'} as it is"


def test_tied_embeddings_beside_a_new_adapter_are_counted_once() -> None:
    model = table()
    assert model.spec.tied_embeddings
    counts = [
        trained_parameters(SftConfig(model="m", tuner_type="lora", modules_to_save=saved), model)
        for saved in ((), SAVED)
    ]
    assert counts[1] - counts[0] == prod(model.hf["model.embed_tokens.weight"])
