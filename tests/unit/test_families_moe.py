"""Mixtures of experts: published configs give the published numbers of parameters, fields are mapped or refused."""

import math
from typing import Any

import pytest

from mswift.converters.plan import ModelTable, table_for
from mswift.converters.spec import MoeSpec
from mswift.errors import ConfigError, LayoutError
from mswift.topology import ParallelDims, check_experts
from mswift.train.flops import matmul_parameters
from mswift.train.memory import idle_parameters, stage_parameters
from tests.support.family_configs import family_config

QWEN: dict[str, Any] = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645,
    "hidden_act": "silu", "initializer_range": 0.02, "mlp_only_layers": [], "output_router_logits": False,
    "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3 = QWEN | {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "head_dim": 128, "model_type": "qwen3_moe",
    "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 40960, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
    "transformers_version": "4.51.0",
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880, "max_position_embeddings": 131072, "model_type": "gpt_oss",
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_key_value_heads": 8, "output_router_logits": False,
    "pad_token_id": 199999, "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                     "rope_type": "yarn", "truncate": False},
    "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088,
}  # fmt: skip
TURNS = ["sliding_attention", "full_attention"]
GLM: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu", "partial_rotary_factor": 0.5,
    "initializer_range": 0.02, "max_position_embeddings": 131072, "model_type": "glm4_moe", "norm_topk_prob": True,
    "num_attention_heads": 96, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 1000000, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.54.0",
    "use_cache": True, "vocab_size": 151552,
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Mixtral-8x7B-v0.1": ({
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
    }, 46_702_792_704),
    "Qwen1.5-MoE-A2.7B": (QWEN | {
        "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
        "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe",
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "rope_theta": 1000000.0,
        "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "transformers_version": "4.39.0.dev0",
    }, 14_315_784_192),
    "Qwen3-30B-A3B": (QWEN3 | {
        "hidden_size": 2048, "intermediate_size": 6144, "max_window_layers": 48, "moe_intermediate_size": 768,
        "num_attention_heads": 32, "num_hidden_layers": 48,
    }, 30_532_122_624),
    "Qwen3-235B-A22B": (QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 94, "moe_intermediate_size": 1536,
        "num_attention_heads": 64, "num_hidden_layers": 94,
    }, 235_093_634_560),
    "OLMoE-1B-7B-0924": ({
        "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
        "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 50304,
    }, 6_919_161_856),
    "gpt-oss-20b": (GPT_OSS | {
        "num_hidden_layers": 24, "num_local_experts": 32, "layer_types": TURNS * 12}, 20_914_757_184),
    "gpt-oss-120b": (GPT_OSS | {
        "num_hidden_layers": 36, "num_local_experts": 128, "layer_types": TURNS * 18}, 116_829_156_672),
    "GLM-4.5-Air": (GLM | {
        "first_k_dense_replace": 1, "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "n_routed_experts": 128, "num_hidden_layers": 46, "routed_scaling_factor": 1.0, "use_qk_norm": False,
    }, 110_468_824_832),
    "GLM-4.5": (GLM | {
        "first_k_dense_replace": 3, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "n_routed_experts": 160, "num_hidden_layers": 92, "routed_scaling_factor": 2.5, "use_qk_norm": True,
    }, 358_337_791_296),
}  # fmt: skip
"""Without quantization_config; sizes as the hub states them (its count of GLM holds the MTP layer's copies)."""


def stored_parameters(table: ModelTable) -> int:
    """Elements on the hub: of the model, and copies that a multi-token-prediction layer brings."""
    copies = [table.hf[drop.same_as] for drop in table.dropped.values() if drop.same_as in table.hf]
    mtp = copies if table.spec.mtp_layers else []
    return sum(map(math.prod, [*table.hf.values(), *mtp]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_number_of_parameters(name: str) -> None:
    config, parameters = PUBLISHED[name]
    assert stored_parameters(table_for(config)) == parameters


ACTIVE = {"Mixtral-8x7B-v0.1": 12.9e9, "Qwen3-30B-A3B": 3.3e9, "Qwen3-235B-A22B": 22e9, "gpt-oss-20b": 3.6e9}
"""Parameters that compute one token, as the vendors state them (gpt-oss without the input embedding)."""


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name: str) -> None:
    table = table_for(PUBLISHED[name][0])
    active = sum(map(math.prod, table.hf.values())) - idle_parameters(table)
    embedding = math.prod(table.hf["model.embed_tokens.weight"])
    assert active - (embedding if name.startswith("gpt") else 0) == pytest.approx(ACTIVE[name], rel=0.03)
    assert matmul_parameters(table.spec) == pytest.approx(active - embedding, rel=0.001)


def test_layers_with_experts() -> None:
    def kinds(**changes: Any) -> str:
        spec = table_for(family_config("qwen3_moe", num_hidden_layers=6, **changes)).spec
        return "".join(layer.mlp[0] for layer in spec.layers)

    assert kinds(decoder_sparse_step=1) == "mmmmmm"
    assert kinds(decoder_sparse_step=2) == "dmdmdm"
    assert kinds(decoder_sparse_step=1, mlp_only_layers=[0, 3]) == "dmmdmm"
    glm = table_for(family_config("glm4_moe", first_k_dense_replace=2))
    assert [layer.mlp for layer in glm.spec.layers] == ["dense", "dense", "moe"]
    assert glm.megatron["decoder.layers.2.mlp.router.expert_bias"].shape == (8,)
    assert glm.has_own_dtype("model.layers.2.mlp.gate.e_score_correction_bias")
    assert "decoder.layers.1.mlp.router.weight" not in glm.megatron
    assert table_for(family_config("qwen2_moe")).megatron["decoder.layers.mlp.router.weight"].shape == (3, 8, 32)


SPECS: dict[str, MoeSpec] = {
    "mixtral": MoeSpec(4, 2, 40, normalize=True),
    "qwen3_moe": MoeSpec(8, 3, 24, normalize=True),
    "qwen2_moe": MoeSpec(8, 3, 24, shared_ffn_hidden_size=48, shared_gate=True),
    "olmoe": MoeSpec(8, 3, 40),
    "gpt_oss": MoeSpec(8, 3, 40, "topk_softmax", True, router_bias=True, expert_bias=True),
    "glm4_moe": MoeSpec(
        8, 3, 24, "sigmoid", True, 1.5, correction_bias=True, num_groups=4, topk_groups=2, group_score="top2",
        shared_ffn_hidden_size=48,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", SPECS)
def test_routing_is_read(family: str) -> None:
    assert table_for(family_config(family)).spec.moe == SPECS[family]


def test_both_spellings_of_the_number_of_experts() -> None:
    config = family_config("qwen3_moe")
    renamed = {("num_local_experts" if name == "num_experts" else name): value for name, value in config.items()}
    assert table_for(renamed).spec == table_for(config).spec


def test_a_checkpoint_decides_between_the_spellings() -> None:
    config = family_config("mixtral")
    each = table_for(config, ["model.layers.0.block_sparse_moe.experts.0.w1.weight"])
    stacked = table_for(config, ["model.layers.0.mlp.experts.gate_up_proj"])
    assert each.hf["model.layers.1.block_sparse_moe.experts.3.w2.weight"] == (32, 40)
    assert stacked.hf["model.layers.1.mlp.experts.gate_up_proj"] == (4, 80, 32)
    assert "model.layers.1.mlp.gate.weight" in stacked.hf
    assert {k: t.shape for k, t in each.megatron.items()} == {k: t.shape for k, t in stacked.megatron.items()}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"output_router_logits": True}, "'output_router_logits' is True"),
    ("mixtral", {"router_jitter_noise": 0.1}, "'router_jitter_noise' is 0.1"),
    ("mixtral", {"num_experts_per_tok": 0}, "'num_experts_per_tok' must be a positive integer, not 0"),
    ("mixtral", {"num_experts_per_tok": 5}, "'num_experts_per_tok' is 5; there are 4 experts"),
    ("olmoe", {"clip_qkv": 8.0}, "'clip_qkv' is 8.0"),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 16}, "'sliding_window' is 16"),
    ("qwen3_moe", {"norm_topk_prob": 1}, "'norm_topk_prob' must be true or false"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "'shared_expert_intermediate_size'"),
    ("gpt_oss", {"swiglu_alpha": 1.5}, "'swiglu_alpha' is 1.5; only 1.702"),
    ("gpt_oss", {"experts_per_token": 4}, "'experts_per_token' is 4; only 3"),
    ("gpt_oss", {"layer_types": ["chunked_attention"] * 3}, "'layer_types' holds 'chunked_attention'"),
    ("glm4_moe", {"scoring_func": "softmax"}, "'scoring_func'"),
    ("glm4_moe", {"n_group": 3}, "'n_group' is 3, which does not divide the 8 experts"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_what_the_spec_cannot_express_is_refused_by_name(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        table_for(family_config(family, **changes))
    assert message in str(caught.value)


LAYOUTS: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_moe", {"world_size": 2, "tp": 2}, "add --sequence_parallel true"),
    ("qwen3_moe", {"world_size": 3, "ep": 3}, "--expert_model_parallel_size 3 does not divide the model's 8 experts"),
    ("mixtral", {"world_size": 16, "etp": 16}, "--expert_tensor_parallel_size 16 does not divide the 40 columns"),
    ("gpt_oss", {"world_size": 2, "tp": 2, "sequence_parallel": True}, "use --expert_tensor_parallel_size 1"),
    ("llama", {"world_size": 2, "ep": 2}, "--expert_model_parallel_size 2: the model has no experts"),
    ("llama", {"world_size": 2, "etp": 2}, "--expert_tensor_parallel_size 2: the model has no experts"),
]


@pytest.mark.parametrize(("family", "layout", "message"), LAYOUTS)
def test_layouts_that_cannot_be_computed_name_the_remedy(family: str, layout: dict[str, Any], message: str) -> None:
    spec = table_for(family_config(family)).spec
    with pytest.raises(LayoutError) as caught:
        check_experts(ParallelDims(**layout), spec.expert_layout)
    assert message in str(caught.value)
    check_experts(ParallelDims(world_size=2, pp=2), spec.expert_layout)


def test_expert_ranks_hold_the_experts_once() -> None:
    table = table_for(family_config("qwen2_moe"))
    whole = stage_parameters(table, ParallelDims(), 0)
    experts = stage_parameters(table, ParallelDims(), 0, experts_only=True)
    for layout in ({"ep": 4}, {"etp": 4}, {"ep": 2, "etp": 2}):
        dims = ParallelDims(world_size=4, **layout)  # type: ignore[arg-type]
        assert stage_parameters(table, dims, 0) == whole - experts + experts // 4
