"""Converted DeepSeek models under megatron-core's own eyes: its GPTModel with MLA, MoE and MTP, built as its users
build it, loads them at TP, EP and PP, and what it saves itself converts to Hugging Face files.
"""

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from mswift.converters.arrays import to_megatron
from mswift.converters.catalog import read_config
from mswift.converters.engine import convert
from mswift.converters.io.torch_dist import other_name
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.plan import table_for
from mswift.converters.verify import verify
from tests.cpu import test_convert_megatron_moe as of_moe
from tests.support.checkpoints import read_model, same, write_model
from tests.support.family_configs import family_config
from tests.support.ranks import join, run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "ep2": (2, {"ep": 2}),
    "pp2": (2, {"pp": 2}),
    "te-names": (1, {}),
}
TE_NAMES = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
"""Of a layer's norms in the specs of Transformer Engine, which holds them in the linears that follow."""
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("deepseek_v3", {}, "tp2"),
    ("deepseek_v3", {"num_hidden_layers": 2}, "pp2"),
    ("deepseek_v3", {"num_nextn_predict_layers": 0}, "ep2"),
    ("deepseek_v2", {"q_lora_rank": None}, "one"),
    ("deepseek_v2", {"first_k_dense_replace": 0}, "ep2"),
    ("deepseek_v3", {"num_nextn_predict_layers": 0}, "te-names"),
    ("deepseek_v2", {"q_lora_rank": None}, "te-names"),
]


@pytest.mark.parametrize(("family", "changes", "layout"), CASES)
def test_megatron_core_loads_and_saves_it(family: str, changes: dict[str, Any], layout: str, tmp_path: Path) -> None:
    config = family_config(family, vocab_size=104, **changes)
    table = table_for(config)
    rng = np.random.default_rng(0)
    tensors = {name: rng.integers(0, 2**30, shape, np.uint32) for name, shape in table.hf.items()}
    write_model(tmp_path / "hf", config, tensors, "F32")
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    (tmp_path / "core").mkdir()
    world_size, degrees = LAYOUTS[layout]
    named_by_te = layout == "te-names"
    ranks = run_ranks(world_size, on_rank, (str(tmp_path), config, world_size, degrees, named_by_te))
    expected = to_megatron(tensors, table)
    ours = {other_name(key): key for key in expected if other_name(key)}
    seen = {key: np.zeros(array.shape, bool) for key, array in expected.items()}
    for key, offset, prepended, local in (entry for rank in ranks for entry in rank):
        sizes = (1,) * prepended + local.shape
        key = ours.get(key, key)
        index = tuple(slice(o, o + s) for o, s in zip(offset, sizes, strict=True))
        assert (local.reshape(sizes).view(np.uint32) == expected[key][index]).all(), (key, offset)
        seen[key][index] = True
    assert [key for key, array in seen.items() if not array.all()] == []
    (tmp_path / "m" / "hf").rename(tmp_path / "core" / "hf")
    written = TorchDistSource(tmp_path / "core").tensors.keys()
    assert {ours.get(key, key) for key in written} == table.megatron.keys()
    assert (written == table.megatron.keys()) is not named_by_te
    convert(tmp_path / "core", tmp_path / "back", "hf")
    assert same(read_model(tmp_path / "back"), tensors)
    assert read_config(tmp_path / "back") == config
    assert verify(tmp_path / "core", tmp_path / "hf").equal


def on_rank(payload: tuple[str, dict[str, Any], int, dict[str, int], bool]) -> list[Any]:
    """What the test of mixtures of experts does, with a model of megatron-core's that has latent attention."""
    *rest, named_by_te = payload
    with patch.object(of_moe, "core_model", partial(core_model, named_by_te=named_by_te)):
        return of_moe.on_rank(tuple(rest))


def core_model(config: dict[str, Any], world_size: int, layout: dict[str, int], named_by_te: bool) -> Any:
    """megatron-core's GPTModel on this rank, random weights; its keys may be those of layers of Transformer Engine."""
    dims, _ = join(world_size, **layout)
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from mswift.parallel.attention.core import SdpaAttention
    from mswift.parallel.megatron import world

    world.enter(dims, 1)
    stage = dims.coordinate(torch.distributed.get_rank()).pp
    spec = table_for(config).spec
    mla, moe = spec.mla, spec.moe
    assert mla is not None
    assert moe is not None
    core = MLATransformerConfig(
        num_layers=spec.num_layers, hidden_size=spec.hidden_size, ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads, q_lora_rank=mla.q_lora_rank, kv_lora_rank=mla.kv_lora_rank,
        qk_head_dim=mla.qk_nope_head_dim, qk_pos_emb_head_dim=mla.qk_rope_head_dim, v_head_dim=mla.v_head_dim,
        rope_type="rope", qk_layernorm=True, num_moe_experts=moe.num_experts,
        moe_layer_freq=1 if spec.stacked else [int(spec.layer(n).mlp == "moe") for n in range(spec.num_layers)],
        moe_ffn_hidden_size=moe.ffn_hidden_size, moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size,
        moe_router_score_function=moe.score, moe_router_enable_expert_bias=moe.correction_bias,
        moe_router_topk=moe.top_k, mtp_num_layers=len(spec.mtp_layers) or None, normalization="RMSNorm",
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        params_dtype=torch.float32, pipeline_dtype=torch.float32, tensor_model_parallel_size=dims.tp,
        pipeline_model_parallel_size=dims.pp, expert_model_parallel_size=dims.ep,
        expert_tensor_parallel_size=dims.sizes["etp"], moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=True, gradient_accumulation_fusion=False, apply_rope_fusion=False,
        persist_layer_norm=False,
    )  # fmt: skip
    block = get_gpt_decoder_block_spec(core, use_transformer_engine=False, normalization="RMSNorm")
    for number, layer in enumerate(block.layer_specs):
        if named_by_te:
            dense = {} if spec.layer(number).mlp == "moe" else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
            layer.submodules.sharded_state_dict_keys_map = TE_NAMES | dense
        layer.submodules.self_attention.submodules.core_attention = SdpaAttention  # its own has one width for all
    with patch.object(multi_latent_attention, "HAVE_TE", False):  # its TELinear is a mock
        model = GPTModel(
            core,
            block,
            vocab_size=spec.vocab_size,
            max_sequence_length=64,
            pre_process=stage == 0,
            post_process=stage == dims.pp - 1,
            position_embedding_type="none",
            mtp_block_spec=of_moe.prediction_layers(core, block) if spec.mtp_layers else None,
        )
    return of_moe.with_groups(model)
