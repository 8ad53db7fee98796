"""LLaMA-Pro without torch: where new blocks stand, how many elements are trained, what is refused."""

import dataclasses
from typing import Any

import pytest

from mswift.config.train import SftConfig
from mswift.converters.plan import table_for
from mswift.errors import ConfigError
from mswift.refusals import train_refusals
from mswift.train.trained import trained_parameters
from mswift.tuners.llamapro import expanded_config, expansion, new_blocks
from tests.support.family_configs import family_config

QWEN_7B: dict[str, Any] = {
    "model_type": "qwen", "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "kv_channels": 128, "seq_length": 8192, "vocab_size": 151936,
    "tie_word_embeddings": False, "no_bias": True,
}  # fmt: skip
PRO = SftConfig(
    model="m", dataset=("a.jsonl",), train_iters=1, backend="fsdp", tuner_type="llamapro", llamapro_num_new_blocks=2
)


def test_new_blocks_stand_behind_their_groups() -> None:
    assert expansion(6, 3, None).new == (2, 5, 8)
    assert expansion(6, 4, 2).layers[3:6] == ((2, True), (2, True), (3, False))
    assert expansion(6, 4, 2).new == (3, 4, 8, 9)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        (
            (6, 4, None),
            "--llamapro_num_new_blocks 4 .as many groups. does not divide the 6 layers .* use --llamapro_num_groups 1 "
            "or 2, or as many new blocks as divide them: 1, 2, 3, 6",
        ),
        ((6, 4, 4), "--llamapro_num_groups 4 does not divide the 6 layers"),
        ((6, 4, 3), "4 is not a multiple of --llamapro_num_groups 3: use --llamapro_num_new_blocks 6"),
    ],
)
def test_numbers_that_do_not_divide_are_refused(numbers: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        expansion(*numbers)


def test_qwen_7b_has_the_published_number_of_trained_parameters() -> None:
    """SWIFT (arXiv 2408.05517), table of tuners: 809.5826 M with four new blocks."""
    places = expansion(32, 4, None)
    table = table_for(expanded_config(QWEN_7B, table_for(QWEN_7B), places))
    config = dataclasses.replace(PRO, llamapro_num_new_blocks=4)
    assert round(trained_parameters(config, table) / 1e6, 4) == 809.5826
    sizes = dict.fromkeys(table.hf, 1)
    trained = sizes.keys() - new_blocks(table, 4, None).frozen(sizes)
    assert {name.split(".")[2] for name in trained} == {"8", "17", "26", "35"}


def test_letters_of_layers_are_repeated() -> None:
    """As the hub has Nemotron-H; transformers writes a list of names."""
    config = family_config("nemotron_h")
    table = table_for(config)
    larger = expanded_config(config, table, expansion(5, 5, None))
    assert (config["hybrid_override_pattern"], larger["hybrid_override_pattern"]) == ("M-*EM", "MM--**EEMM")
    assert [table_for(larger).spec.layer(2 * n + 1) for n in range(5)] == [table.spec.layer(n) for n in range(5)]


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "qwen3_next"])
def test_layers_that_their_number_makes_are_refused(family: str) -> None:
    config = family_config(family, num_hidden_layers=4)
    with pytest.raises(ConfigError, match=f"llamapro: of model_type '{family}' the number of a layer decides"):
        expanded_config(config, table_for(config), expansion(4, 4, None))


def test_layers_to_predict_ahead_are_refused() -> None:
    config = family_config("deepseek_v3")
    with pytest.raises(
        ConfigError, match="1 multi-token-prediction layers, which would be lost: use --backend megatron"
    ):
        expanded_config(config, table_for(config), expansion(3, 3, None))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tuner_type": "full"}, "--llamapro_num_new_blocks 2 has no effect with --tuner_type full"),
        ({"llamapro_num_new_blocks": 0}, "--llamapro_num_new_blocks 0 must be at least 1"),
        ({"llamapro_num_groups": 0}, "--llamapro_num_groups 0 must be at least 1"),
        ({"new_special_tokens": ("<a>",)}, "--new_special_tokens <a> with --tuner_type llamapro"),
        ({"load_weights_only": True, "resume_from_checkpoint": "c"}, "add blocks to --model c"),
        ({"freeze_parameters": ("model",)}, "--freeze_parameters is for --tuner_type full; of llamapro the base"),
        ({"lora_rank": 4}, "--lora_rank 4 has no effect with --tuner_type llamapro"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(change: dict[str, Any], text: str) -> None:
    spec = table_for(family_config("llama")).spec
    assert train_refusals(PRO, spec, 1) == []
    found = [str(refusal) for refusal in train_refusals(dataclasses.replace(PRO, **change), spec, 1)]
    assert any(text in refusal for refusal in found), found


def test_megatron_trains_no_new_blocks_of_experts() -> None:
    config = dataclasses.replace(PRO, backend="megatron")
    assert train_refusals(config, table_for(family_config("llama")).spec, 1) == []
    (found,) = train_refusals(config, table_for(family_config("qwen3_moe")).spec, 1)
    assert "llamapro) of a model with experts: transformers' model stacks them" in str(found)
