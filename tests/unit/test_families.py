"""config.json in both spellings, and every field mapped, without effect, or refused by name."""

import math
from typing import Any

import pytest

from mswift.converters.layout import Region, tiling_fault
from mswift.converters.plan import table_for
from mswift.converters.spec import RopeSpec
from mswift.errors import ConfigError, LayoutError
from tests.support.checkpoints import hf_shapes, megatron_tensors, random_tensors, tiny_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    *((family, {"tie_word_embeddings": True}) for family in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
    ("llama", {"num_key_value_heads": 4, "num_attention_heads": 4}),
    ("llama", {"num_key_value_heads": 1}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_names_and_shapes(family: str, changes: dict[str, Any]) -> None:
    config = tiny_config(family, **changes)
    table = table_for(config)
    assert dict(table.hf) == hf_shapes(config)
    expected = megatron_tensors(config, random_tensors(config))
    assert {k: t.shape for k, t in table.megatron.items()} == {k: a.shape for k, a in expected.items()}


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_shards_of_all_ranks_tile_every_tensor(family: str, changes: dict[str, Any], tp: int) -> None:
    groups = changes.get("num_key_value_heads", 12)
    config = tiny_config(
        family, **{"num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 24} | changes
    )
    table = table_for(config)
    if groups % tp:
        with pytest.raises(LayoutError, match=f"--tensor_model_parallel_size {tp}"):
            table.check_tp(tp)
        return
    table.check_tp(tp)
    for key, tensor in table.megatron.items():
        layers = range(config["num_hidden_layers"]) if tensor.stacked else (None,)
        ranks = range(tp if tensor.rule.cut else 1)
        boxes: list[Region] = [r for layer in layers for rank in ranks for r in table.shard(key, rank, tp, layer)]
        assert tiling_fault(boxes, tensor.shape) is None


def test_vocabulary_shards_hold_no_padding() -> None:
    table = table_for(tiny_config(vocab_size=5))
    rows = [table.shard("output_layer.weight", rank, 4) for rank in range(4)]
    assert [r[0].sizes[0] if r else 0 for r in rows] == [2, 2, 1, 0]


def test_tensor_parallel_size_that_cuts_a_group_names_sizes_that_work() -> None:
    table = table_for(tiny_config(num_attention_heads=8, num_key_value_heads=4, intermediate_size=20))
    with pytest.raises(LayoutError) as caught:
        table.check_tp(8)
    message = str(caught.value)
    assert "--tensor_model_parallel_size 8" in message
    assert "4 key/value heads (KV groups)" in message
    assert message.endswith("it can be 1, 2, 4")
    for works in (1, 2, 4):
        table.check_tp(works)


ROPE: list[tuple[dict[str, Any], RopeSpec]] = [
    ({"rope_theta": 5e5}, RopeSpec(5e5)),
    ({"rope_theta": None}, RopeSpec(1e4)),
    ({"rope_scaling": None}, RopeSpec(1e4)),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, RopeSpec(1e4, "linear", 4.0)),
    ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}}, RopeSpec(1e4, "linear", 4.0)),
    ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, RopeSpec(5e5, "llama3", 8.0, 1.0, 4.0, 8192)),
    ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, RopeSpec(1e6)),
    (
        {"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        RopeSpec(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
    ),
]


@pytest.mark.parametrize(("changes", "rope"), ROPE)
def test_rope_in_both_spellings(changes: dict[str, Any], rope: RopeSpec) -> None:
    assert table_for(tiny_config(**changes)).spec.rope == rope


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "rope_scaling.rope_type' is 'ntk'"),
    ("llama", {"rope_scaling": {"type": "ntk", "factor": 4.0}}, "'ntk'"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks ['high_freq_factor'"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}, "unknown ['beta_fast']"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "positive numbers"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters has 500000.0"),
    ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
    ("llama", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; only 'silu'"),
    ("llama", {"attention_dropout": 0.1}, "'attention_dropout' is 0.1"),
    (
        "llama",
        {"hidden_siz": 3},
        "'hidden_siz' is not known to have no effect on the model (did you mean 'hidden_size'?)",
    ),
    ("llama", {"quantization_config": {"bits": 4}}, "'quantization_config'"),
    ("llama", {"sliding_window": 4096}, "'sliding_window'"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "'architectures'"),
    ("llama", {"hidden_size": None}, "'hidden_size' must be a positive integer, not None"),
    ("llama", {"num_hidden_layers": 0}, "'num_hidden_layers' must be a positive integer, not 0"),
    ("llama", {"tie_word_embeddings": "yes"}, "'tie_word_embeddings' must be true or false"),
    ("llama", {"num_attention_heads": 5}, "num_attention_heads 5 is not a multiple of num_key_value_heads 2"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "'sliding_attention'"),
    ("qwen3", {"layer_types": ["full_attention"] * 2, "sliding_window": None}, "has 2 entries for 3 layers"),
    ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "holds 'chunked_attention'"),
    ("qwen2", {"mlp_bias": True}, "'mlp_bias'"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_what_the_spec_cannot_express_is_refused_by_name(family: str, changes: dict[str, Any], message: str) -> None:
    table_for(tiny_config(family))
    with pytest.raises(ConfigError) as caught:
        table_for(tiny_config(family, **changes))
    assert message in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 2}),
        ("qwen3", {"layer_types": ["full_attention"] * 3, "sliding_window": None, "use_sliding_window": False}),
        ("llama", {"pretraining_tp": 1, "attention_dropout": 0.0, "_name_or_path": "x", "transformers_version": "4.1"}),
    ],
)
def test_fields_without_effect_are_accepted(family: str, changes: dict[str, Any]) -> None:
    assert table_for(tiny_config(family, **changes)).spec == table_for(tiny_config(family)).spec


_ROPE_31 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
_TOKENS = {"bos_token_id": 151643, "eos_token_id": 151645}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7b": ({
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
    }, 6_738_415_616),
    "Llama-3.1-8B": ({
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": _ROPE_31, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0",
        "use_cache": True, "vocab_size": 128256,
    }, 8_030_261_248),
    "Mistral-7B-v0.3": ({
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 32768,
    }, 7_248_023_552),
    "Qwen2.5-0.5B": (_TOKENS | {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896,
        "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
        "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    }, 494_032_768),
    "Qwen3-0.6B": (_TOKENS | {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 151936,
    }, 596_049_920),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_number_of_parameters(name: str) -> None:
    config, parameters = PUBLISHED[name]
    assert sum(map(math.prod, table_for(config).hf.values())) == parameters


def test_unknown_model_type_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'qwen22' is not supported .*did you mean 'qwen2'"):
        table_for(tiny_config() | {"model_type": "qwen22"})
    with pytest.raises(ConfigError, match="has no model_type; write one of"):
        table_for({})
