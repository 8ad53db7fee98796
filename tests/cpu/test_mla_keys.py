"""The keys and shapes of the DeepSeek tables are those of a plain megatron-core program with MLA, MoE and MTP."""

from typing import Any

import pytest

from mswift.converters.plan import table_for
from tests.support.deepseek import V3
from tests.support.ranks import join, run_ranks

TINY: dict[str, Any] = V3 | {
    "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 20,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10, "vocab_size": 103, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("q_lora_rank", [12, None])
def test_keys_are_those_of_megatron_core(q_lora_rank: int | None) -> None:
    config = TINY | {"q_lora_rank": q_lora_rank}
    (found,) = run_ranks(1, "tests/cpu/test_mla_keys.py:keys_of_megatron_core", config)
    assert {key: tensor.shape for key, tensor in table_for(config).megatron.items()} == found


def keys_of_megatron_core(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Key -> global shape of the sharded state dict of a GPTModel as a user of megatron-core builds it."""
    join(1)
    from unittest.mock import patch

    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from mswift.parallel.attention import SdpaAttention
    from mswift.parallel.megatron import world
    from mswift.parallel.norms import RMSNorm
    from mswift.topology import ParallelDims

    world.enter(ParallelDims(world_size=1), 1)
    core = MLATransformerConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        q_lora_rank=config["q_lora_rank"],
        kv_lora_rank=config["kv_lora_rank"],
        qk_head_dim=config["qk_nope_head_dim"],
        qk_pos_emb_head_dim=config["qk_rope_head_dim"],
        v_head_dim=config["v_head_dim"],
        rope_type="rope",
        qk_layernorm=True,
        num_moe_experts=config["n_routed_experts"],
        moe_layer_freq=[0, 1, 1],
        moe_ffn_hidden_size=config["moe_intermediate_size"],
        moe_shared_expert_intermediate_size=config["moe_intermediate_size"] * config["n_shared_experts"],
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_topk=config["num_experts_per_tok"],
        mtp_num_layers=1,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    block = get_gpt_decoder_block_spec(core, use_transformer_engine=False, normalization="RMSNorm")
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = SdpaAttention
    mtp = get_gpt_mtp_block_spec(core, block, use_transformer_engine=False)
    for spec in mtp.layer_specs:
        for name in ("enorm", "hnorm", "layer_norm"):
            setattr(spec.submodules, name, RMSNorm)  # the local one is LayerNorm whatever the config says
    with patch.object(multi_latent_attention, "HAVE_TE", False):  # its TELinear is a mock
        model = GPTModel(
            core,
            block,
            vocab_size=config["vocab_size"],
            max_sequence_length=64,
            position_embedding_type="none",
            mtp_block_spec=mtp,
        )
    state = model.sharded_state_dict()
    apply_factories(state)
    world.leave()
    return {t.key: tuple(t.global_shape) for t in nested_values(state) if not t.key.endswith("_extra_state")}
