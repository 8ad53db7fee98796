"""The small model of a proof can be laid out exactly as the large one, and has its features."""

import math
from typing import Any

import pytest

from mswift.converters.plan import table_for
from mswift.errors import ConfigError
from mswift.refusals import check_computed
from mswift.topology import ParallelDims, check_experts, check_stages, check_tensor_parallel
from mswift.train.scaled_model import scaled_dims, scaled_spec, scaled_table
from tests.support.family_configs import FAMILY_CONFIGS, family_config

LAYOUTS: list[dict[str, Any]] = [
    {"world_size": 2, "tp": 2, "sequence_parallel": True},
    {"world_size": 4, "tp": 4, "sequence_parallel": True},
    {"world_size": 2, "ep": 2},
    {"world_size": 3, "ep": 3},
    {"world_size": 4, "ep": 2, "etp": 2},
    {"world_size": 2, "pp": 2},
]
KIMI = {"hidden_size": 7168, "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 256,
        "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "num_hidden_layers": 61, "vocab_size": 129280,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
        "intermediate_size": 18432}  # fmt: skip


def fits(spec: Any, dims: ParallelDims, *, stages: bool) -> bool:
    """Whether the layout is accepted."""
    try:
        check_tensor_parallel(dims.tp, spec.tensor_parallel_units)
        check_experts(dims, spec.expert_layout)
        if stages:
            check_stages(spec.num_layers, dims.pp)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_the_small_model_fits_where_the_large_one_does(family: str) -> None:
    spec = table_for(family_config(family)).spec
    for degrees in LAYOUTS:
        dims = ParallelDims(**degrees)
        small = scaled_spec(spec, dims)
        assert fits(small, dims, stages=True) == fits(spec, dims, stages=False), degrees
        kinds = [{(layer.mixer, layer.mlp, layer.rope) for layer in map(s.layer, range(s.num_layers))}
                 for s in (small, spec)]  # fmt: skip
        assert kinds[0] == kinds[1]
        check_computed(small)
        assert scaled_table(family_config(family), dims).spec == small


def test_a_large_model_becomes_small() -> None:
    dims = ParallelDims(world_size=4, tp=2, ep=2, etp=2, pp=1, sequence_parallel=True)
    table = scaled_table(family_config("deepseek_v3", **KIMI), dims)
    assert sum(math.prod(tensor.shape) for tensor in table.megatron.values()) < 500_000
    moe = table.spec.moe
    assert moe is not None
    assert (moe.num_groups, moe.topk_groups, moe.num_experts, moe.top_k) == (8, 4, 16, 4)
    assert table.spec.vocab_size % 2 == 0


def test_unequal_stages_stay_unequal() -> None:
    spec = table_for(family_config("llama", num_hidden_layers=10)).spec
    dims = scaled_dims(spec, ParallelDims(world_size=2, pp=2, vpp=2, chunk_layers=(0, 2, 6, 2)))
    assert dims.chunk_layers == (0, 1, 2, 1)
    assert scaled_spec(spec, dims).num_layers == 4
    equal = ParallelDims(world_size=2, pp=2)
    assert scaled_dims(spec, equal) is equal
