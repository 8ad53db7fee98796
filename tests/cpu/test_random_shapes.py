"""Promise 2 beyond the shapes that somebody thought of: random models on random layouts against one rank.

Everything is drawn: family, heads, groups, head dimension, layers, columns, experts, how many are chosen, ties, biases,
vocabulary, batch, documents in its rows, what is trained, and a layout on two or four ranks. What a run would be
refused for is left out by the refusals themselves. `make test` draws a few (always the same), `make test-all` many.
What it has found: docs/known-megatron-faults.md.
"""

from itertools import product
from math import prod
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, find, given, note, settings
from hypothesis import strategies as st

from mswift.converters.adapters import refuse_recurrent
from mswift.converters.plan import table_for
from mswift.errors import ConfigError
from mswift.refusals import check_computed, check_context_parallel
from mswift.topology import ParallelDims, check_experts, check_stages, check_tensor_parallel
from tests.support.family_configs import FAMILY_CONFIGS, REMOTE_CODE
from tests.support.matrix import proof, references

FAMILIES = sorted(FAMILY_CONFIGS.keys() - REMOTE_CODE)
RUN = settings(print_blob=True, suppress_health_check=list(HealthCheck))
EXPERTS = {"num_experts", "n_routed_experts", "num_local_experts"}
EVEN = st.integers(2, 8).map(lambda n: 2 * n)


@st.composite
def models(draw: st.DrawFn, family: str, unit: int) -> dict[str, Any]:
    """A config.json with sizes that `unit` tensor-parallel ranks can share."""
    config = {"model_type": family} | FAMILY_CONFIGS[family]
    groups = unit * draw(st.integers(1, 3))
    sizes = {
        "vocab_size": draw(st.integers(40, 160)),
        "num_hidden_layers": draw(st.sampled_from((2, 4))),
        "num_nextn_predict_layers": 0,
        "num_attention_heads": groups * draw(st.integers(1, 3)),
        "num_key_value_heads": groups,
        "intermediate_size": unit * draw(st.integers(3, 24)),
        "moe_intermediate_size": unit * draw(st.integers(3, 12)),
        "shared_expert_intermediate_size": unit * draw(st.integers(3, 12)),
        "num_experts": draw(st.sampled_from((4, 6, 8, 12))),
        "num_experts_per_tok": draw(st.integers(1, 4)),
        "hidden_size": 8 * draw(st.integers(2, 8)),
        "head_dim": draw(EVEN),
        "kv_lora_rank": draw(EVEN),
        "qk_nope_head_dim": draw(EVEN),
        "v_head_dim": draw(EVEN),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }
    if "kv_lora_rank" in config:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if "head_dim" not in config:  # the hidden size is cut in heads
        sizes["hidden_size"] = sizes["num_attention_heads"] * sizes["head_dim"]
    if family == "mamba2":
        sizes["hidden_size"] = config["num_heads"] * sizes["head_dim"] // config["expand"]
    sizes["experts_per_token"] = sizes["num_experts_per_tok"]
    sizes["hybrid_override_pattern"] = draw(st.sampled_from(("M*E-", "*EM-", "E-M*")))[: sizes["num_hidden_layers"]]
    if family == "phi3":
        pairs = int(sizes["head_dim"] * config["partial_rotary_factor"]) // 2
        factors = {name: [1.0 + n / 4 for n in range(pairs)] for name in ("short_factor", "long_factor")}
        sizes["rope_scaling"] = config["rope_scaling"] | factors
    return config | {name: value for name, value in sizes.items() if name in config}


def shares(world_size: int, number: int) -> list[tuple[int, ...]]:
    """Every `number` of degrees whose product divides the ranks."""
    degrees = product((1, 2, 4), repeat=number)
    return [each for each in degrees if world_size % prod(each) == 0]


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """(ProofJob arguments, ranks, degrees) on two or four ranks."""
    world_size = draw(st.sampled_from((2, 4)))
    tp, cp, pp = draw(st.sampled_from(shares(world_size, 3)))
    degrees: dict[str, Any] = {"tp": tp, "cp": cp, "pp": pp}
    config = draw(models(draw(st.sampled_from(FAMILIES)), tp))
    experts = EXPERTS & config.keys()
    if experts:
        degrees["ep"], degrees["etp"] = draw(st.sampled_from(shares(world_size // pp, 2)))
    degrees["sequence_parallel"] = tp > 1 and (bool(experts) or draw(st.booleans()))
    if pp > 1 and draw(st.booleans()):
        degrees["vpp"] = 2
    job = {
        "config": config, "num_microbatches": 4, "batch": draw(st.integers(1, 2)),
        "length": 8 * draw(st.integers(1, 3)), "seed": draw(st.integers(0, 9)),
        "loss_fusion": draw(st.sampled_from(("true", "false"))), "packed": draw(st.booleans()),
        "target_modules": draw(st.sampled_from(((), (), ("all-linear",)))),
    }  # fmt: skip
    if cp > 1:
        job["cp_comm_type"] = draw(st.sampled_from(("p2p", "all_gather", "a2a", "a2a+p2p")))
        if job["cp_comm_type"] == "a2a+p2p":
            degrees["cp_levels"] = (2, cp // 2)
    return job, world_size, degrees


def computable(job: dict[str, Any], world_size: int, degrees: dict[str, Any]) -> bool:
    """Whether a run would not be refused; the refusals decide."""
    try:
        dims, table = ParallelDims(world_size=world_size, **degrees), table_for(job["config"])
        spec = table.spec
        check_computed(spec)
        check_tensor_parallel(dims.tp, spec.tensor_parallel_units)
        check_stages(spec.num_layers, dims.pp, dims.chunks)
        check_experts(dims, spec.expert_layout)
        check_context_parallel(dims, job.get("cp_comm_type", "p2p"), spec)
        if job.get("target_modules"):
            refuse_recurrent(table)
    except ConfigError:
        return False
    return dims.chunks == 1 or job["num_microbatches"] // dims.dp % dims.pp == 0


def check(case: tuple[dict[str, Any], int, dict[str, Any]]) -> None:
    """One case, as soon as it is one that runs."""
    job, world_size, degrees = case
    found = proof(job, world_size, degrees, references(job))
    for d in found:
        if not d.explained:
            note(f"{d.name}: {d.difference:.1e}, noise floor {d.noise:.1e}")
    assert [d for d in found if not d.explained] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_is_left_out(family: str) -> None:
    """A drawn config that the family's table refuses would be left out without a word."""
    first = settings(RUN, phases=[Phase.generate])  # no smaller one
    find(models(family, 1), lambda config: computable({"config": config, "num_microbatches": 1}, 1, {}), settings=first)


@settings(RUN, max_examples=6)
@given(cases().filter(lambda case: computable(*case)))
def test_a_few_random_models_equal_one_rank(case: Any) -> None:
    check(case)


@pytest.mark.whole
@settings(RUN, max_examples=100, derandomize=False)
@given(cases().filter(lambda case: computable(*case)))
def test_many_random_models_equal_one_rank(case: Any) -> None:
    check(case)
