"""Converted mixtures of experts under megatron-core's own eyes: its GPTModel, built as its users build it, loads them
at TP, EP, ETP and PP, and what it saves itself converts to Hugging Face files.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mswift.converters.arrays import to_megatron
from mswift.converters.catalog import read_config
from mswift.converters.engine import convert
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.plan import ModelTable, table_for
from mswift.converters.verify import verify
from tests.support.checkpoints import read_model, same, write_model
from tests.support.family_configs import family_config
from tests.support.ranks import join, leaving_groups, run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "ep2": (2, {"ep": 2}),
    "etp2": (2, {"etp": 2}),
    "tp2-etp1": (2, {"tp": 2, "etp": 1}),
    "pp2": (2, {"pp": 2}),
    "te-names": (1, {"own_norm": True}),
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_hidden_layers": 2, "decoder_sparse_step": 1},
    "qwen2_moe": {"num_hidden_layers": 2},
    "glm4_moe": {"num_hidden_layers": 2},
}
WITH_PREDICTION = "glm4_moe with a prediction layer"
CHANGES = MODELS | {WITH_PREDICTION: {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}}


def core_model(config: dict[str, Any], world_size: int, layout: dict[str, Any]) -> Any:
    """megatron-core's GPTModel on this rank, random weights."""
    degrees = dict(layout)
    own_norm = degrees.pop("own_norm", False)
    dims, _ = join(world_size, **degrees)
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mswift.parallel.megatron import world

    world.enter(dims, 1)
    stage = dims.coordinate(torch.distributed.get_rank()).pp
    spec = table_for(config).spec
    moe = spec.moe
    assert moe is not None
    core = TransformerConfig(
        num_layers=spec.num_layers, hidden_size=spec.hidden_size, num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_kv_heads, kv_channels=spec.head_dim, ffn_hidden_size=spec.ffn_hidden_size,
        normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, add_qkv_bias=spec.qkv_bias, qk_layernorm=spec.qk_norm == "head",
        params_dtype=torch.float32, pipeline_dtype=torch.float32, tensor_model_parallel_size=dims.tp,
        pipeline_model_parallel_size=dims.pp, expert_model_parallel_size=dims.ep,
        expert_tensor_parallel_size=dims.sizes["etp"], num_moe_experts=moe.num_experts, moe_router_topk=moe.top_k,
        moe_ffn_hidden_size=moe.ffn_hidden_size, moe_token_dispatcher_type="alltoall",
        moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size or None, moe_shared_expert_gate=moe.shared_gate,
        moe_router_score_function="sigmoid" if moe.correction_bias else "softmax",
        moe_router_enable_expert_bias=moe.correction_bias,
        moe_layer_freq=1 if spec.stacked else [int(spec.layer(n).mlp == "moe") for n in range(spec.num_layers)],
        mtp_num_layers=len(spec.mtp_layers) or None, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        persist_layer_norm=False, apply_rope_fusion=False,
    )  # fmt: skip
    block = get_gpt_decoder_block_spec(core, use_transformer_engine=False, normalization="RMSNorm")
    if own_norm:  # as in the layers of Transformer Engine
        for number, layer in enumerate(block.layer_specs):
            if spec.layer(number).mlp == "moe":
                layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    model = GPTModel(
        core,
        block,
        vocab_size=-(-spec.vocab_size // dims.tp) * dims.tp,
        max_sequence_length=64,
        pre_process=stage == 0,
        post_process=stage == dims.pp - 1,
        position_embedding_type="none",
        share_embeddings_and_output_weights=spec.tied_embeddings,
        mtp_block_spec=prediction_layers(core, block) if spec.mtp_layers else None,
    )
    return with_groups(model)


def prediction_layers(core: Any, block: Any) -> Any:
    """megatron-core's block of multi-token-prediction layers like the last of these layers; None on other stages."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    from mswift.parallel.norms import RMSNorm

    mtp = get_gpt_mtp_block_spec(core, block, use_transformer_engine=False)
    for prediction in mtp.layer_specs if mtp is not None else ():
        for name in ("enorm", "hnorm", "layer_norm"):
            setattr(prediction.submodules, name, RMSNorm)  # the local one is LayerNorm whatever the config says
    return mtp


def with_groups(model: Any) -> Any:
    """The model, whose sharded_state_dict is given the group that its prediction layers ask for on a later stage."""
    from megatron.core import parallel_state

    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    model.sharded_state_dict = partial(model.sharded_state_dict, metadata=groups)
    return model


@leaving_groups
def on_rank(payload: tuple[str, dict[str, Any], int, dict[str, int]]) -> list[Any]:
    """Loads PATH/m, saves it again to PATH/core; (key, offset, prepended axes, values) of what was loaded."""
    path, config, world_size, layout = payload
    model = core_model(config, world_size, layout)
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    missing = model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), path + "/m"), strict=True)
    assert (missing.missing_keys, missing.unexpected_keys) == ([], [])
    dist_checkpointing.save(model.sharded_state_dict(), path + "/core")
    result = []
    for entry in model.sharded_state_dict().values():
        for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            if isinstance(part, ShardedTensor):
                assert part.data is not None
                result.append((part.key, part.global_offset, part.prepend_axis_num, part.data.detach().numpy().copy()))
    return result


def make(path: Path, family: str) -> tuple[dict[str, Any], ModelTable, dict[str, Any]]:
    """An fp32 Hugging Face model at path/hf, converted to path/m."""
    config = family_config(family.split()[0], vocab_size=104, **CHANGES[family])  # padded vocabularies are another test
    table = table_for(config)
    rng = np.random.default_rng(0)
    tensors = {name: rng.integers(0, 2**30, shape, np.uint32) for name, shape in table.hf.items()}
    write_model(path / "hf", config, tensors, "F32")
    convert(path / "hf", path / "m", "megatron")
    return config, table, tensors


CASES = [(family, layout) for family in MODELS for layout in ("ep2", "tp2")]
CASES += [("qwen2_moe", "one"), ("qwen3_moe", "etp2"), ("qwen2_moe", "tp2-etp1"), ("glm4_moe", "pp2")]
CASES += [("qwen3_moe", "te-names"), ("glm4_moe", "te-names")]
CASES += [(WITH_PREDICTION, "tp2")]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_megatron_core_loads_and_saves_it(family: str, layout: str, tmp_path: Path) -> None:
    config, table, tensors = make(tmp_path, family)
    expected = to_megatron(tensors, table)
    (tmp_path / "core").mkdir()
    world_size, degrees = LAYOUTS[layout]
    ranks = run_ranks(world_size, on_rank, (str(tmp_path), config, world_size, degrees))
    seen = {key: np.zeros(array.shape, bool) for key, array in expected.items()}
    for key, offset, prepended, local in (entry for rank in ranks for entry in rank):
        sizes = (1,) * prepended + local.shape
        key = key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        index = tuple(slice(o, min(o + s, n)) for o, s, n in zip(offset, sizes, expected[key].shape, strict=True))
        want = expected[key][index]
        assert (local.reshape(sizes)[tuple(map(slice, want.shape))].view(np.uint32) == want).all(), (key, offset)
        seen[key][index] = True
    assert [key for key, array in seen.items() if not array.all()] == []
    (tmp_path / "m" / "hf").rename(tmp_path / "core" / "hf")
    if layout != "te-names":
        assert TorchDistSource(tmp_path / "core").tensors.keys() == table.megatron.keys()
    convert(tmp_path / "core", tmp_path / "back", "hf")
    assert same(read_model(tmp_path / "back"), tensors)
    assert read_config(tmp_path / "back") == config
    assert verify(tmp_path / "core", tmp_path / "hf").equal
