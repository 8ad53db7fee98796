"""Promise 2 beyond the shapes that somebody thought of: random models on random layouts against one rank.

Everything is drawn: family, heads, groups, head dimension, layers, columns, experts, how many are chosen, ties, biases,
vocabulary, batch, and a layout on two or four ranks. What a run would be refused for is left out by the refusals
themselves. `make test` draws a few (always the same), `make test-all` many. What it has found:
docs/known-megatron-faults.md.
"""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from mswift.converters.plan import table_for
from mswift.errors import ConfigError
from mswift.refusals import check_computed
from mswift.topology import ParallelDims, check_experts, check_stages, check_tensor_parallel
from tests.support.family_configs import FAMILY_CONFIGS, REMOTE_CODE
from tests.support.matrix import proof, references

FAMILIES = sorted(FAMILY_CONFIGS.keys() - REMOTE_CODE)
RUN = settings(print_blob=True, suppress_health_check=list(HealthCheck))
EVEN = st.integers(2, 8).map(lambda n: 2 * n)


@st.composite
def models(draw: st.DrawFn, unit: int) -> dict[str, Any]:
    """A config.json with sizes that `unit` tensor-parallel ranks can share."""
    family = draw(st.sampled_from(FAMILIES))
    config = {"model_type": family} | FAMILY_CONFIGS[family] | {"num_nextn_predict_layers": 0}
    groups = unit * draw(st.integers(1, 3))
    sizes = {
        "vocab_size": draw(st.integers(40, 160)),
        "num_hidden_layers": draw(st.sampled_from((2, 4))),
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
    return config | {name: value for name, value in sizes.items() if name in config}


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, dict[str, Any]]:
    """(ranks, degrees of parallelism) of at most four ranks."""
    world_size = draw(st.sampled_from((2, 4)))
    of = {2: (1, 2), 4: (1, 2, 4)}[world_size]
    degrees: dict[str, Any] = {axis: draw(st.sampled_from(of)) for axis in ("tp", "pp", "ep")}
    degrees["etp"] = draw(st.sampled_from((None, *of)))
    degrees["sequence_parallel"] = degrees["tp"] > 1 and draw(st.booleans())
    return world_size, degrees


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """(ProofJob arguments, ranks, degrees)."""
    world_size, degrees = draw(layouts())
    config = draw(models(degrees["tp"]))
    job = {
        "config": config, "num_microbatches": 4, "batch": draw(st.integers(1, 2)),
        "length": 8 * draw(st.integers(1, 3)), "seed": draw(st.integers(0, 9)),
        "loss_fusion": draw(st.sampled_from(("true", "false"))),
    }  # fmt: skip
    return job, world_size, degrees


def computable(job: dict[str, Any], world_size: int, degrees: dict[str, Any]) -> bool:
    """Whether a run would not be refused; the refusals decide."""
    try:
        dims, spec = ParallelDims(world_size=world_size, **degrees), table_for(job["config"]).spec
        check_computed(spec)
        check_tensor_parallel(dims.tp, spec.tensor_parallel_units)
        check_stages(spec.num_layers, dims.pp)
        check_experts(dims, spec.expert_layout)
    except ConfigError:
        return False
    return True


def check(case: tuple[dict[str, Any], int, dict[str, Any]]) -> None:
    """One case, as soon as it is one that runs."""
    job, world_size, degrees = case
    found = proof(job, world_size, degrees, references(job))
    for d in found:
        if not d.explained:
            note(f"{d.name}: {d.difference:.1e}, noise floor {d.noise:.1e}")
    assert [d for d in found if not d.explained] == []


@settings(RUN, max_examples=6)
@given(cases().filter(lambda case: computable(*case)))
def test_a_few_random_models_equal_one_rank(case: Any) -> None:
    check(case)


@pytest.mark.whole
@settings(RUN, max_examples=100, derandomize=False)
@given(cases().filter(lambda case: computable(*case)))
def test_many_random_models_equal_one_rank(case: Any) -> None:
    check(case)
