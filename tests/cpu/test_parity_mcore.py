"""Fields of megatron-core that are passed on keep the numbers of the one-rank run: fp32, at most 5e-6 apart."""

from typing import Any

import pytest

from mswift.config import mcore_fields
from tests.cpu.test_parity_overlap import OVERLAP, SGD, TOLERANCE, WHAT, one_rank, steps
from tests.support.parity import differences, megatron_run
from tests.support.ranks import join, run_ranks

BOTH = {"overlap_grad_reduce": True, "overlap_param_gather": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES: list[tuple[str, int, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # model, ranks, layout, settings, mcore
    ("qwen2_moe", 2, {"ep": 2}, {}, {"moe_token_dispatcher_type": "allgather"}),
    ("qwen2_moe", 2, {"ep": 2}, {}, {"moe_shared_expert_overlap": True}),
    ("llama-tied", 2, {"pp": 2}, {}, {"batch_p2p_sync": False}),
    ("llama-tied", 2, {"pp": 2, "vpp": 2}, {}, {"microbatch_group_size_per_vp_stage": 4}),
    (
        *("llama-tied", 2, {"tp": 2}, FULL),
        {
            "distribute_saved_activations": True,
            "deterministic_mode": True,
            "disable_bf16_reduced_precision_matmul": True,
            "clone_scatter_output_in_embedding": False,
        },
    ),
    ("llama-tied", 2, {}, BOTH, {"reduce_scatter_with_fp32_accumulation": True, "bucket_size": 20_000}),
    (
        *("llama-tied", 2, {}, {}),
        {
            "bucket_size": 20_000,
            "check_for_nan_in_grad": True,
            "check_for_large_grads": True,
            "pad_buckets_for_high_nccl_busbw": True,
            "reduce_scatter_with_fp32_accumulation": True,
        },
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {' '.join(case[4])}"[:60])
def test_numbers_stay(case: tuple[str, int, dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
    name, world_size, layout, settings, mcore = case
    assert set(mcore) <= mcore_fields.PASSED
    config, start, truth = one_rank(name)
    found = megatron_run(config, start, steps(), SGD | settings | {"mcore": mcore}, world_size, layout)
    assert {n: d for n, d in differences(found, truth, WHAT).items() if not d <= TOLERANCE} == {}


def test_a_run_does_not_inherit_the_collective_of_the_one_before() -> None:
    """megatron-core replaces its reduce-scatter for the whole process, and nobody waits for the replacement."""
    config, start, truth = one_rank("llama-tied")
    for settings in ({"mcore": {"reduce_scatter_with_fp32_accumulation": True}}, OVERLAP):
        found = megatron_run(config, start, steps(), SGD | settings, 2, {})
        assert max(differences(found, truth, WHAT).values()) <= TOLERANCE


def test_every_passed_field_is_tried() -> None:
    """But where there is nothing to compare: a folder for logs, and shapes that do not vary here. And elsewhere:

    the share of the prediction layers' loss, in test_parity_mtp.py.
    """
    tried = {name for case in CASES for name in case[4]}
    assert tried | {"config_logger_dir", "variable_seq_lengths", "mtp_loss_scaling_factor"} == mcore_fields.PASSED


def refusals(_payload: None) -> list[str]:
    """What the engine's own checks say, of values that megatron-core refuses and of what a CPU lacks."""
    _, device = join(1)
    from mswift.errors import ConfigError
    from mswift.parallel.megatron.config import EngineConfig, check_device, transformer_config
    from mswift.topology import ParallelDims
    from tests.unit.test_refusals import SPEC

    said = []
    for fields in ({"cuda_graph_impl": "local"}, {"moe_token_dispatcher_type": "flex"}):
        with pytest.raises(ConfigError) as refusal:
            check_device(EngineConfig(mcore=fields), device)
        said.append(str(refusal.value))
    with pytest.raises(ConfigError) as refusal:
        check_device(EngineConfig(gradient_accumulation_fusion=True), device)
    said.append(str(refusal.value))
    settings = EngineConfig(mcore={"distribute_saved_activations": True}, **FULL)
    with pytest.raises(ConfigError) as refusal:
        transformer_config(SPEC, ParallelDims(2, tp=2, sequence_parallel=True), settings)
    return [*said, str(refusal.value)]


def test_what_megatron_core_or_the_device_refuses_is_one_clear_error() -> None:
    gpu, flex, fusion, combination = run_ranks(1, refusals)[0]
    assert "--mcore.cuda_graph_impl local needs a GPU" in gpu
    assert "--mcore.moe_token_dispatcher_type flex needs a GPU" in flex
    assert "--gradient_accumulation_fusion on cpu: it needs a GPU" in fusion
    assert "--mcore.distribute_saved_activations True: megatron-core refuses it" in combination
