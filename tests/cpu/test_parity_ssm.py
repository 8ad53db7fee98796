"""Promise 2 for models with recurrent mixers: any layout computes what transformers' own PyTorch code computes.

fp32; logits, loss, gradient norm and every gradient at most 1e-5 apart (max|a - b| / max|b| per tensor).
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from mswift.converters.adapters import refuse_recurrent
from mswift.converters.plan import table_for
from mswift.errors import ConfigError
from mswift.tuners.part import Part
from tests.support.parity import BASE, differences, megatron_run, model_of, random_steps, reference
from tests.support.spaces import Arrays, weights_of

MAMBA = {"n_groups": 4, "chunk_size": 10, "time_step_min": 0.6}
ATTENTION = {"intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"}
MIXERS_ONLY = MAMBA | {name: value for name, value in BASE.items() if name not in ATTENTION}
# Qwen3-Next's gated norms divide small outputs by their size: with an epsilon of 1e-6 transformers in fp32 is 2.7e-5
# from itself in fp64, no oracle for 1e-5.
MODELS: dict[str, dict[str, Any]] = {
    "mamba2": MIXERS_ONLY | {"model_type": "mamba2", "num_heads": 8, "head_dim": 16, "state_size": 24},
    "mamba2-one-group": MIXERS_ONLY | {
        "model_type": "mamba2", "num_heads": 4, "head_dim": 32, "state_size": 24, "n_groups": 1,
        "tie_word_embeddings": True, "time_step_limit": (0.5, 1.5),
    },
    "nemotron_h": BASE | MAMBA | {
        "model_type": "nemotron_h", "hybrid_override_pattern": "M-*M", "mamba_num_heads": 8, "mamba_head_dim": 12,
        "ssm_state_size": 24, "head_dim": 24, "mlp_bias": True,
    },
    "nemotron_h-experts": BASE | MAMBA | {
        "model_type": "nemotron_h", "hybrid_override_pattern": "ME*E", "mamba_num_heads": 8, "mamba_head_dim": 12,
        "ssm_state_size": 24, "head_dim": 24, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4,
        "topk_group": 2, "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 56,
        "routed_scaling_factor": 1.5,
    },
    "qwen3_next": BASE | {
        "model_type": "qwen3_next", "head_dim": 32, "full_attention_interval": 2, "linear_num_key_heads": 4,
        "linear_num_value_heads": 8, "linear_key_head_dim": 12, "linear_value_head_dim": 20, "num_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 56,
        "mlp_only_layers": [1], "rms_norm_eps": 1e-3,
    },
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "ep2": (2, {"ep": 2}),
    "tp4-sp": (4, {"tp": 4, "sequence_parallel": True}),
}
CASES = [
    *(("mamba2", layout) for layout in ("one", "tp2", "tp2-sp", "pp2", "dp2", "tp4-sp")),
    *(("mamba2-one-group", layout) for layout in ("one", "pp2")),
    *(("nemotron_h", layout) for layout in ("one", "tp2", "tp2-sp", "pp2")),
    *(("nemotron_h-experts", layout) for layout in ("one", "tp2-sp", "pp2", "ep2")),
    *(("qwen3_next", layout) for layout in ("one", "tp2-sp", "pp2", "ep2")),
]
SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}
FIRST = ("logits", "loss", "grad_norm", "gradients")
TOLERANCE = 1e-5


def hub_names(arrays: Mapping[str, Any]) -> Arrays:
    """Nemotron-H as its checkpoints name it: transformers has another prefix, and experts in one tensor."""
    out: Arrays = {}
    for name, array in arrays.items():
        found = re.fullmatch(r"(.*\.mixer\.experts)\.(up_proj|down_proj)", name)
        named = {f"{found[1]}.{e}.{found[2]}.weight": array[e] for e in range(len(array))} if found else {name: array}
        out |= {hub_name(n): a for n, a in named.items()}
    return out


def hub_name(name: str) -> str:
    """A parameter's, where nothing is stacked."""
    return re.sub(r"^model\.", "backbone.", name)


@torch.no_grad()
def weaken_decay(model: torch.nn.Module) -> None:
    """Less than 1 a step in the exponent: transformers takes differences of its sums, which lose digits as they grow.

    Ours does not (`tests/cpu/test_recurrences.py`, against fp64 and at full decay). Where nearly all decays, moreover,
    the decay's own gradient is a small rest of large terms.
    """
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("A_log"):
            parameter.sub_(4.0)


@cache
def expected(name: str) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """(config.json, start weights, what transformers computes in fp64: in fp32 it is up to 6e-6 from that)."""
    model = model_of(MODELS[name])
    if name in ("mamba2", "qwen3_next"):
        weaken_decay(model)
    config = {k: v for k, v in model.config.to_dict().items() if v is not None}
    rename = hub_names if config["model_type"] == "nemotron_h" else dict
    start = rename({n: w.copy() for n, w in weights_of(model).items()})
    model.set_experts_implementation("eager")  # the grouped product is not there in fp64
    truth = reference(model.double(), random_steps(), SGD)
    return config, start, {n: rename(a) if isinstance(a, dict) else a for n, a in truth.items()}


@pytest.mark.parametrize("name", ["nemotron_h", "nemotron_h-experts"])
def test_transformers_model_cut_over_ranks_equals_itself(name: str) -> None:
    """By the engine of transformers models, from the names that files have."""
    config, start, truth = expected(name)
    found = megatron_run(config, start, random_steps(), SGD | {"backend": "fsdp", "shard_size": 2}, 2, {})
    apart = differences(found, truth, (*FIRST, "weights", "momentum_buffer"))
    assert {n: d for n, d in apart.items() if not d <= TOLERANCE} == {}


PARTS = {
    "share": Part(ratio=0.4, trainable=("backbone.layers.0.norm",)),
    "new blocks": Part(freeze_regex=".", trainable=("backbone.layers.1.", "backbone.layers.3.")),
}
"""By the names that files have; what LLaMA-Pro trains is said so too."""


@pytest.mark.parametrize("backend", ["megatron", "fsdp"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_named_as_files_name_it(part: str, backend: str) -> None:
    config, start, _ = expected("nemotron_h")
    model = model_of(MODELS["nemotron_h"])
    sizes = {hub_name(name): parameter.numel() for name, parameter in model.named_parameters()}
    frozen = PARTS[part].frozen(sizes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(hub_name(name) not in frozen)
    truth = reference(model, random_steps(), SGD)
    wanted = {n: hub_names(a) if isinstance(a, dict) else a for n, a in truth.items()}
    own = {"backend": backend, "part": PARTS[part]} | ({"shard_size": 2} if backend == "fsdp" else {})
    found = megatron_run(config, start, random_steps(), SGD | own, 2, {})
    assert {
        n: d for n, d in differences(found, wanted, ("loss", "grad_norm", "weights")).items() if not d <= 1e-5
    } == {}
    assert all(np.array_equal(found["weights"][name], start[name]) for name in frozen)
    states = {key.partition(".of.")[2] for rank in found["states"] for key in rank}
    assert states == sizes.keys() - frozen


def run(name: str, layout: str, broken: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(Megatron's results, transformers' results) of three steps."""
    config, start, truth = expected(name)
    world_size, degrees = LAYOUTS[layout]
    return megatron_run(config, start, random_steps(), SGD, world_size, degrees, broken), truth


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_three_steps_of_sgd_equal_transformers(name: str, layout: str) -> None:
    found, truth = run(name, layout)
    apart = differences(found, truth, (*FIRST, "weights", "momentum_buffer"))
    assert {n: d for n, d in apart.items() if not d <= TOLERANCE} == {}


@contextmanager
def without_the_sum_of_squares() -> Iterator[None]:
    """Each rank normalises its own channels by themselves."""
    from mswift.parallel.megatron import mamba

    with patch.object(mamba, "reduce_from_tensor_model_parallel_region", lambda x, group=None: x):
        yield


@contextmanager
def without_the_sum_of_head_norms() -> Iterator[None]:
    """The gradient of a weight that all heads share is that of this rank's heads."""
    from mswift.parallel.megatron import delta

    with patch.object(delta, "copy_to_tensor_model_parallel_region", lambda x, group=None: x):
        yield


@contextmanager
def with_b_and_c_exchanged() -> Iterator[None]:
    """Slices in another order."""
    from mswift.parallel.megatron import mamba

    scan = mamba.state_space_scan
    with patch.object(mamba, "state_space_scan", lambda x, dt, a, b, c, size: scan(x, dt, a, c, b, size)):
        yield


HERE = "tests/cpu/test_parity_ssm.py:"
BREAKS = {
    f"{HERE}without_the_sum_of_squares": ("mamba2", "tp2", "logits"),
    f"{HERE}without_the_sum_of_head_norms": ("qwen3_next", "tp2-sp", "gradients"),
    f"{HERE}with_b_and_c_exchanged": ("nemotron_h", "one", "logits"),
    "tp reduce": ("mamba2", "tp2", "logits"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_rule_is_seen(broken: str) -> None:
    name, layout, what = BREAKS[broken]
    found, truth = run(name, layout, broken)
    assert max(differences(found, truth, (what,)).values()) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["mamba2", "nemotron_h-experts", "qwen3_next"])
def test_bf16_learns_at_tp2(name: str) -> None:
    """bf16 weights, fp32 masters and recurrences: the first loss is fp32's to bf16's precision, then it falls."""
    config, start, truth = expected(name)
    settings = {"optimizer": "adam", "lr": 3e-3, "weight_decay": 0.1, "clip_grad": 1.0, "dtype": "BF16"}
    steps = [random_steps(num_steps=1)[0]] * 6
    found = megatron_run(config, start, steps, settings, *LAYOUTS["tp2-sp"])
    assert found["loss"][0] == pytest.approx(truth["loss"][0], rel=1e-2)
    assert found["loss"][-1] < 0.9 * found["loss"][0]


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_adapters_of_recurrent_mixers_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="mixers that take no adapter yet; use --tuner_type full"):
        refuse_recurrent(table_for(expected(name)[0]))
