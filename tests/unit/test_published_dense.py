"""Published config.json files of the dense families: read as they are, with the published number of parameters."""

import math
from typing import Any

import pytest

from mswift.converters.plan import table_for
from mswift.converters.spec import LayerSpec, RopeSpec
from mswift.errors import ConfigError

LONG = [1.05 + 0.7 * i for i in range(48)]
SHORT = [1.0 + 0.01 * i for i in range(48)]
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Phi-3-mini-128k-instruct": ({
        "_name_or_path": "Phi-3-mini-128k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 1,
        "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"}, "rope_theta": 10000.0,
        "sliding_window": 262144, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.2", "use_cache": True, "vocab_size": 32064,
    }, 3_821_079_552),
    "Phi-4-mini-instruct": ({
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 199999, "embd_pdrop": 0.0,
        "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072,
        "initializer_range": 0.02, "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3", "num_attention_heads": 24,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "original_max_position_embeddings": 4096,
        "pad_token_id": 199999, "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"}, "rope_theta": 10000.0,
        "sliding_window": 262144, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0", "use_cache": True, "vocab_size": 200064,
    }, 3_836_021_760),
    "phi-4": ({
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 100257, "embd_pdrop": 0.0, "eos_token_id": 100265, "hidden_act": "silu", "hidden_size": 5120,
        "initializer_range": 0.02, "intermediate_size": 17920, "max_position_embeddings": 16384,
        "model_type": "phi3", "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
        "original_max_position_embeddings": 16384, "pad_token_id": 100349, "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 250000, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.47.0",
        "use_cache": True, "vocab_size": 100352,
    }, 14_659_507_200),
    "gemma-2b": ({
        "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
        "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 16384, "max_position_embeddings": 8192,
        "model_type": "gemma", "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
        "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0,
        "torch_dtype": "bfloat16", "transformers_version": "4.38.0.dev0", "use_cache": True, "vocab_size": 256000,
    }, 2_506_172_416),
    "gemma-2-2b": ({
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
        "torch_dtype": "float32", "transformers_version": "4.42.4", "use_cache": True, "vocab_size": 256000,
    }, 2_614_341_888),
    "gemma-3-1b-pt": ({
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152, "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
    }, 999_885_952),
    "OLMo-2-1124-7B": ({
        "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "olmo2",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False,
        "torch_dtype": "float32", "transformers_version": "4.47.0.dev0", "use_cache": False, "vocab_size": 100352,
    }, 7_298_617_344),
    "granite-3.1-2b-base": ({
        "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
        "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "logits_scaling": 8.0, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite",
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0,
        "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 5000000.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.46.0.dev0",
        "use_cache": True, "vocab_size": 49155,
    }, 2_533_531_648),
    "starcoder2-3b": ({
        "activation_function": "gelu", "architectures": ["Starcoder2ForCausalLM"], "attention_dropout": 0.1,
        "attention_softmax_in_fp32": True, "bos_token_id": 0, "embedding_dropout": 0.1, "eos_token_id": 0,
        "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "initializer_range": 0.018042,
        "intermediate_size": 12288, "layer_norm_epsilon": 1e-05, "max_position_embeddings": 16384,
        "mlp_type": "default", "model_type": "starcoder2", "norm_epsilon": 1e-05, "norm_type": "layer_norm",
        "num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2, "residual_dropout": 0.1,
        "rope_theta": 999999.4420358813, "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True,
        "sliding_window": 4096, "torch_dtype": "float32", "transformers_version": "4.37.0.dev0", "use_bias": True,
        "use_cache": True, "vocab_size": 49152,
    }, 3_030_371_328),
    "glm-4-9b-hf": ({
        "architectures": ["GlmForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 13696, "max_position_embeddings": 8192, "model_type": "glm",
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2, "pad_token_id": 151329,
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.46.0.dev0",
        "use_cache": True, "vocab_size": 151552,
    }, 9_399_951_360),
    "GLM-4-9B-0414": ({
        "architectures": ["Glm4ForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 13696, "max_position_embeddings": 32768,
        "model_type": "glm4", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2,
        "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.52.0.dev0",
        "use_cache": True, "vocab_size": 151552,
    }, 9_400_279_040),
    "internlm2-7b": ({
        "architectures": ["InternLM2ForCausalLM"], "auto_map": {"AutoConfig": "configuration_internlm2.X"},
        "bias": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "internlm2", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pad_token_id": 2, "rms_norm_eps": 1e-05, "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rope_theta": 1000000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.41.0", "use_cache": True, "vocab_size": 92544, "attn_implementation": "eager",
        "pretraining_tp": 1,
    }, 7_737_708_544),
    "internlm3-8b-instruct": ({
        "architectures": ["InternLM3ForCausalLM"], "attention_dropout": 0.0, "auto_map": {}, "bias": False,
        "bos_token_id": 1, "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 10240, "max_position_embeddings": 32768,
        "model_type": "internlm3", "num_attention_heads": 32, "num_hidden_layers": 48, "num_key_value_heads": 2,
        "pad_token_id": 2, "qkv_bias": False, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}, "rope_theta": 50000000,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.47.1",
        "use_cache": True, "vocab_size": 128512,
    }, 8_804_241_408),
    "Qwen-7B": ({
        "architectures": ["QWenLMHeadModel"], "attn_dropout_prob": 0.0, "auto_map": {}, "bf16": False,
        "emb_dropout_prob": 0.0, "fp16": False, "fp32": False, "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 22016, "kv_channels": 128, "layer_norm_epsilon": 1e-06,
        "max_position_embeddings": 32768, "model_type": "qwen", "no_bias": True, "num_attention_heads": 32,
        "num_hidden_layers": 32, "onnx_safe": None, "rotary_emb_base": 10000, "rotary_pct": 1.0,
        "scale_attn_weights": True, "seq_length": 8192, "softmax_in_fp32": False, "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer", "transformers_version": "4.32.0", "use_cache": True,
        "use_cache_kernel": False, "use_cache_quantization": False, "use_dynamic_ntk": True,
        "use_flash_attn": "auto", "use_logn_attn": True, "vocab_size": 151936,
    }, 7_721_324_544),
}  # fmt: skip
"""Long and short factors of LongRoPE stand in for the published lists, which are as long."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_number_of_parameters(name: str) -> None:
    config, parameters = PUBLISHED[name]
    assert sum(map(math.prod, table_for(config).hf.values())) == parameters


def spec(name: str, **changes: Any) -> Any:
    return table_for(PUBLISHED[name][0] | changes).spec


def test_longrope_and_the_rotated_share() -> None:
    rope = spec("Phi-4-mini-instruct").rope
    assert (rope.kind, rope.rotary_dim, rope.factor, rope.original_max_position_embeddings) == (
        "longrope",
        96,
        32,
        4096,
    )
    assert (len(rope.short_factor), rope.long_factor) == (48, tuple(LONG))
    assert spec("phi-4").rope == RopeSpec(250000.0)
    older = {"long_factor": LONG, "short_factor": SHORT, "type": "su"}
    assert spec("Phi-3-mini-128k-instruct", rope_scaling=older) == spec("Phi-3-mini-128k-instruct")


def test_windows() -> None:
    assert spec("starcoder2-3b").layers == (LayerSpec(window=4096),) * 30
    assert [layer.window for layer in spec("gemma-2-2b").layers] == [4096, None] * 13
    layers = spec("gemma-3-1b-pt").layers
    assert [n for n, layer in enumerate(layers) if layer.window is None] == [5, 11, 17, 23]
    assert {(layer.window, layer.rope) for layer in layers} == {(512, 1), (None, 0)}
    assert spec("Phi-3-mini-128k-instruct").layers == ()  # 262144 masks nothing within 131072


def test_two_ropes() -> None:
    assert spec("gemma-3-1b-pt").ropes == (RopeSpec(1e6), RopeSpec(1e4))
    linear = spec("gemma-3-1b-pt", rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert linear.ropes == (RopeSpec(1e6, "linear", 8.0), RopeSpec(1e4))


def test_dropout_is_known_so_that_training_can_refuse_it() -> None:
    assert spec("granite-3.1-2b-base").dropout == spec("starcoder2-3b").dropout == 0.1
    assert spec("starcoder2-3b", attention_dropout=0, residual_dropout=0, embedding_dropout=0).dropout == 0


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Phi-4-mini-instruct", {"rope_scaling": YARN | {"type": "yarn"}, "resid_pdrop": 0.1}, "'resid_pdrop' is 0.1"),
    ("Phi-4-mini-instruct", {"lm_head_bias": True}, "'lm_head_bias' is True"),
    ("Phi-4-mini-instruct", {"partial_rotary_factor": 1.0}, "rope_scaling.short_factor' has 48 numbers; 64 are"),
    ("Phi-3-mini-128k-instruct", {"rope_scaling": {"type": "longrope", "long_factor": LONG}}, "lacks ['short_factor']"),
    ("gemma-2b", {"hidden_act": "silu"}, "'hidden_act' is 'silu'; supported: 'gelu_pytorch_tanh', 'gelu'"),
    ("gemma-2b", {"hidden_activation": "gelu"}, "'hidden_activation' is 'gelu'; only 'gelu_pytorch_tanh'"),
    ("gemma-2b", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
    ("gemma-2-2b", {"attn_logit_softcapping": -1}, "'attn_logit_softcapping' must be a positive number"),
    ("gemma-2-2b", {"layer_types": ["full_attention"]}, "'layer_types' has 1 entries for 26 layers"),
    ("gemma-3-1b-pt", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is 50.0; only None"),
    ("gemma-3-1b-pt", {"rope_parameters": {"mixed": {}}}, "'rope_parameters' has unknown ['mixed']"),
    ("starcoder2-3b", {"norm_type": "rms_norm"}, "'norm_type' is 'rms_norm'"),
    ("starcoder2-3b", {"hidden_act": "relu"}, "'hidden_act' is 'relu'"),
    ("starcoder2-3b", {"residual_dropout": 1.0}, "'residual_dropout' must be a number from 0 to below 1"),
    ("granite-3.1-2b-base", {"residual_multiplier": 0}, "'residual_multiplier' must be a positive number"),
    ("OLMo-2-1124-7B", {"clip_qkv": 8.0}, "'clip_qkv'"),
    ("Qwen-7B", {"rotary_pct": 0.5}, "'rotary_pct' is 0.5"),
    ("Qwen-7B", {"intermediate_size": 22017}, "'intermediate_size' must be even, not 22017"),
    ("Qwen-7B", {"no_bias": False}, "'no_bias' is False"),
    ("internlm2-7b", {"rope_scaling": {"type": "linear", "factor": 2.0, "base": 3}}, "unknown ['base']"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec(name, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_yarn_as_the_model_cards_recommend_it(family: str) -> None:
    config = {
        "model_type": family, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 103, "max_position_embeddings": 32768,
        "rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    }  # fmt: skip
    rope = table_for(config).spec.rope
    assert rope == RopeSpec(1e6, "yarn", 4.0, original_max_position_embeddings=32768)
