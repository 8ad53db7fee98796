"""DeepSeek-V2 and -V3: published configs and sizes, the multi-token-prediction layer, refusals by name."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mswift.converters.describe import describe
from mswift.converters.engine import convert, plan
from mswift.converters.layout import tiling_fault
from mswift.converters.plan import table_for
from mswift.converters.reader import WeightReader
from mswift.converters.spec import ModelSpec, RopeSpec
from mswift.converters.verify import verify
from mswift.errors import CheckpointError, ConfigError, LayoutError
from mswift.train.flops import matmul_parameters
from tests.support.checkpoints import Array, read_model, same, write_model
from tests.support.deepseek import V2, V2_LITE, V3, hub_tensors

V2_TINY: dict[str, Any] = V2 | {
    "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 3, "q_lora_rank": 12, "kv_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 10, "vocab_size": 103, "max_position_embeddings": 64,
}  # fmt: skip
_SIZES = {key: V2_TINY[key] for key in V2_TINY if V2_TINY[key] != V2.get(key)}
V3_TINY: dict[str, Any] = V3 | _SIZES | {"first_k_dense_replace": 1}

PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "DeepSeek-V2-Lite": (V2_LITE, 15_706_484_224, 0),
    "DeepSeek-V2": (V2, 235_741_434_880, 0),
    "DeepSeek-V3": (V3, 671_026_419_200, 11_610_068_224),
}
"""config.json, parameters of the model, parameters of its multi-token-prediction layer beside them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_tensors_and_sizes(name: str) -> None:
    config, parameters, beside = PUBLISHED[name]
    tensors = hub_tensors(config)
    table = table_for(config, tensors)
    assert {n: shape for n, (_, shape) in tensors.items() if n not in table.dropped} == dict(table.hf)
    assert {n for n, (dtype, _) in tensors.items() if dtype == "F32"} == {n for n in tensors if table.has_own_dtype(n)}
    layers = tuple(f"model.layers.{config['num_hidden_layers'] + n}." for n in range(len(table.spec.mtp_layers)))
    mtp = sum(math.prod(shape) for n, shape in table.hf.items() if layers and n.startswith(layers))
    assert (sum(map(math.prod, table.hf.values())) - mtp, mtp) == (parameters, beside)


def test_what_v3_says_of_its_model() -> None:
    spec = table_for(V3).spec
    assert [layer.mlp for layer in spec.layers] == ["dense"] * 3 + ["moe"] * 58
    assert spec.rope == RopeSpec(
        1e4, "yarn", 40.0, original_max_position_embeddings=4096, interleaved=True, beta_fast=32, beta_slow=1,
        mscale=1.0, mscale_all_dim=1.0,
    )  # fmt: skip
    assert spec.attention_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2, rel=1e-12)
    moe = spec.moe
    assert moe is not None
    assert (moe.score, moe.normalize, moe.scale, moe.correction_bias) == ("sigmoid", True, 2.5, True)
    assert (moe.num_groups, moe.topk_groups, moe.group_score, moe.top_k) == (8, 4, "top2", 8)
    assert moe.shared_ffn_hidden_size == 2048


def test_what_v2_says_of_its_router() -> None:
    large, lite = (table_for(config).spec.moe for config in (V2, V2_LITE))
    assert large is not None
    assert lite is not None
    assert (large.score, large.normalize, large.scale) == ("softmax", False, 16.0)
    assert (large.num_groups, large.topk_groups, large.group_score) == (8, 3, "max")
    assert (lite.num_groups, lite.topk_groups, lite.scale) == (1, 1, 1.0)


def test_greedy_choice_ignores_the_groups() -> None:
    def moe(**changes: Any) -> Any:
        return table_for(V2_TINY | {"topk_method": "greedy"} | changes).spec.moe

    assert moe(n_group=None, topk_group=None) == moe(n_group=4, topk_group=2) == moe(n_group=1, topk_group=1)


VARIANTS: list[dict[str, Any]] = [
    V2_TINY, V3_TINY, V3_TINY | {"q_lora_rank": None}, V2_TINY | {"first_k_dense_replace": 0},
    V3_TINY | {"n_shared_experts": 0}, V3_TINY | {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
]  # fmt: skip


@pytest.mark.parametrize("config", VARIANTS, ids=range(len(VARIANTS)))
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_of_all_ranks_tile_every_tensor(config: dict[str, Any], tp: int) -> None:
    table = table_for(config)
    table.check_tp(tp)
    experts = range(config["n_routed_experts"])
    for key, tensor in table.megatron.items():
        boxes = [
            region
            for layer in (range(config["num_hidden_layers"]) if tensor.stacked else (None,))
            for expert in (experts if tensor.rule.experts else (None,))
            for rank in range(tp if tensor.rule.cut else 1)
            for region in table.shard(key, rank, tp, layer, expert)
        ]
        assert tiling_fault(boxes, tensor.shape) is None, key


@pytest.mark.parametrize("q_lora_rank", [12, None])
def test_flops_count_every_matrix(q_lora_rank: int | None) -> None:
    table = table_for(V3_TINY | {"q_lora_rank": q_lora_rank, "n_routed_experts": 8, "num_nextn_predict_layers": 0})
    elements = {key: math.prod(tensor.shape) for key, tensor in table.megatron.items() if len(tensor.shape) > 1}
    idle = sum(n // 8 * (8 - 3) for key, n in elements.items() if ".experts.experts." in key)
    assert matmul_parameters(table.spec) == sum(elements.values()) - idle - elements["embedding.word_embeddings.weight"]


def test_heads_stay_whole() -> None:
    with pytest.raises(LayoutError, match="4 attention heads"):
        table_for(V3_TINY | {"intermediate_size": 48, "vocab_size": 96}).check_tp(8)


def random_tensors(config: dict[str, Any], *, mtp: bool, dtype: str = "F32") -> dict[str, Array]:
    """Random bits; the copies in the multi-token-prediction layer are copies."""
    generator = np.random.default_rng(3)
    types = {"F32": "<u4", "BF16": "<u2"}
    tensors = {
        name: generator.integers(0, 1 << 15, shape, types[dtype if own == "BF16" else own])
        for name, (own, shape) in hub_tensors(config, mtp=mtp).items()
    }
    prefix = f"model.layers.{config['num_hidden_layers']}."
    if mtp:
        tensors[prefix + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors[prefix + "shared_head.head.weight"] = tensors["lm_head.weight"].copy()
    return tensors


@pytest.mark.parametrize("mtp", [True, False], ids=["hub", "transformers"])
def test_there_and_back_with_and_without_the_prediction_layer(tmp_path: Path, mtp: bool) -> None:
    """As the hub has it, and as transformers writes it: without the layer, although config.json names one."""
    tensors = random_tensors(V3_TINY, mtp=mtp)
    write_model(tmp_path / "hf", V3_TINY, tensors, "F32", shards=3)
    manifest = convert(tmp_path / "hf", tmp_path / "m", "megatron")
    assert len(manifest.dropped) == (2 if mtp else 0)
    convert(tmp_path / "m", tmp_path / "back", "hf")
    assert same(read_model(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == V3_TINY
    assert verify(tmp_path / "hf", tmp_path / "m").equal
    table = WeightReader(tmp_path / "m").table
    assert len(table.spec.mtp_layers) == mtp
    assert any(key.startswith("mtp.layers.0.") for key in table.megatron) == mtp
    (tmp_path / "m" / "mswift_manifest.json").unlink()
    assert WeightReader(tmp_path / "m").table.spec == table.spec


def test_a_copy_in_the_prediction_layer_that_differs_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(V3_TINY, mtp=True)
    name = "model.layers.3.shared_head.head.weight"
    tensors[name][-1, -1] ^= 1
    write_model(tmp_path / "hf", V3_TINY, tensors, "F32")
    assert f"dropped {name}: equal to lm_head.weight (compared" in describe(plan(tmp_path / "hf", "megatron"), 10**9)
    with pytest.raises(CheckpointError, match=rf"{name} .*differs from lm_head.weight"):
        convert(tmp_path / "hf", tmp_path / "m", "megatron")


def test_half_a_prediction_layer_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(V3_TINY, mtp=True)
    del tensors["model.layers.3.enorm.weight"]
    write_model(tmp_path / "hf", V3_TINY, tensors, "F32")
    with pytest.raises(CheckpointError, match=r"1 missing \(model.layers.3.enorm.weight\)"):
        plan(tmp_path / "hf", "megatron")


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (V2_TINY, {"scoring_func": "sigmoid"}, "'scoring_func' is 'sigmoid'; only 'softmax'"),
    (V2_TINY, {"topk_method": "noaux_tc"}, "'topk_method' is 'noaux_tc'; supported: 'greedy', 'group_limited_greedy'"),
    (V2_TINY, {"norm_topk_prob": True}, "'norm_topk_prob' is True"),
    (V2_TINY, {"topk_group": None}, "'topk_group' must be a positive integer"),
    (V2_TINY, {"mlp_bias": True}, "'mlp_bias' is True"),
    (V3_TINY, {"scoring_func": "softmax"}, "'scoring_func' is 'softmax'; only 'sigmoid'"),
    (V3_TINY, {"topk_method": "greedy"}, "'topk_method' is 'greedy'; only 'noaux_tc'"),
    (V3_TINY, {"attention_bias": True}, "'attention_bias' is True"),
    (V3_TINY, {"moe_layer_freq": 2}, "'moe_layer_freq' is 2; only 1"),
    (V3_TINY, {"num_key_value_heads": 2}, "'num_key_value_heads' is 2; only 4"),
    (V3_TINY, {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    (V3_TINY, {"q_lora_rank": 0}, "'q_lora_rank' must be a positive integer, not 0"),
    (V3_TINY, {"first_k_dense_replace": -1}, "'first_k_dense_replace' must be a positive integer, not -1"),
    (V3_TINY, {"n_group": 3}, "'n_group' is 3, which does not divide the 8 experts"),
    (V3_TINY, {"topk_group": 5}, "'topk_group' is 5; there are 4 groups"),
    (V3_TINY, {"topk_group": 1}, "'num_experts_per_tok' is 3, but 1 groups of 2 experts are chosen"),
    (V3_TINY, {"num_experts_per_tok": 9}, "'num_experts_per_tok' is 9"),
    (V3_TINY, {"qk_head_dim": 11}, "'qk_head_dim' is 11; only 10"),
    (V3_TINY, {"index_topk": 64}, "'index_topk' is not known"),
    (V3_TINY, {"rope_scaling": {"type": "dynamic", "factor": 2.0, "mscale": 1.0}}, "unknown ['mscale']"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "changes", "message"), REFUSED)
def test_what_is_not_expressed_is_refused_by_name(config: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        table_for(config | changes)
    assert message in str(caught.value)


def test_both_spellings_of_transformers_are_read() -> None:
    """transformers 5 writes rope_parameters, dtype, head_dim and qk_head_dim."""
    rope = {("rope_type" if k == "type" else k): v for k, v in V3_TINY["rope_scaling"].items()}
    changed = {k: v for k, v in V3_TINY.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype", "auto_map")}
    changed |= {"rope_parameters": rope | {"rope_theta": 10000}, "dtype": "bfloat16", "head_dim": 4, "qk_head_dim": 10}
    changed |= {"rope_interleave": True, "output_router_logits": False}

    def spec(config: dict[str, Any]) -> ModelSpec:
        return table_for(config).spec

    assert spec(changed) == spec(V3_TINY)
