"""Promise 2 for latent attention (DeepSeek-V2 and -V3): any layout computes what transformers computes.

fp32; logits, loss, gradient norm and every gradient at most 1e-5 apart (max|a - b| / max|b| per tensor).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest

from tests.support.parity import BASE, differences, megatron_run, model_of, random_steps, reference
from tests.support.spaces import weights_of

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7,
}  # fmt: skip
LATENT = {
    "num_hidden_layers": 2, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 10, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 40, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
    "rms_norm_eps": 1e-3,
}  # fmt: skip
GROUPS = {"n_group": 4, "topk_group": 2}
MODELS: dict[str, dict[str, Any]] = {
    "v3": LATENT | GROUPS | {"model_type": "deepseek_v3", "rope_parameters": YARN},
    "v3-direct": LATENT | GROUPS | {"model_type": "deepseek_v3", "q_lora_rank": None, "norm_topk_prob": False},
    "v3-halves": LATENT | GROUPS | {"model_type": "deepseek_v3", "rope_interleave": False, "n_shared_experts": 1},
    "v2": LATENT | GROUPS | {
        "model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "rope_parameters": YARN | {"mscale": 0.7},
    },
    "v2-lite": LATENT | {"model_type": "deepseek_v2", "q_lora_rank": None, "topk_method": "greedy"},
    "dense": LATENT | GROUPS | {"model_type": "deepseek_v3", "first_k_dense_replace": 2, "rope_parameters": YARN},
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "ep2": (2, {"ep": 2}),
    "tp2-sp-ep2": (4, {"tp": 2, "sequence_parallel": True, "ep": 2}),
}
SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}
FIRST = ("logits", "loss", "grad_norm", "gradients")
TOLERANCE = 1e-5


@cache
def expected(name: str) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """(config.json, start weights, what transformers computes)."""
    model = model_of(BASE | MODELS[name])
    config = {k: v for k, v in model.config.to_dict().items() if v is not None or k == "q_lora_rank"}
    start = {n: w.copy() for n, w in weights_of(model).items()}
    return config, start, reference(model, random_steps(), SGD)


def run(name: str, layout: str, broken: str | None = None) -> tuple[Any, Any]:
    """(Megatron's results, transformers' results) of three steps."""
    config, start, truth = expected(name)
    world_size, degrees = LAYOUTS[layout]
    return megatron_run(config, start, random_steps(), SGD, world_size, degrees, broken), truth


CASES = [(name, layout) for name in ("v3", "v2") for layout in ("one", "tp2-sp", "pp2", "ep2")]
CASES += [(name, layout) for name in ("v3-direct", "v2-lite") for layout in ("one", "tp2-sp")]
CASES += [("v3-halves", "one"), ("v3", "tp2-sp-ep2"), ("dense", "one"), ("dense", "tp2"), ("dense", "tp2-sp")]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_three_steps_of_sgd_equal_transformers(name: str, layout: str) -> None:
    found, truth = run(name, layout)
    apart = differences(found, truth, (*FIRST, "weights", "momentum_buffer"))
    assert {n: d for n, d in apart.items() if not d <= TOLERANCE} == {}


BREAKS = {
    "without_sum_of_shared_key": ("dense", "tp2", "gradients"),
    "without_sum_of_shared_key_of_a_sequence": ("v3", "tp2-sp", "gradients"),
    "without_marks_on_down_projections": ("dense", "tp2-sp", "gradients"),
    "without_yarn_in_the_softmax": ("v3", "one", "logits"),
    "with_the_norm_of_the_model": ("v3", "one", "logits"),
    "with_halves_for_pairs": ("v3-direct", "one", "logits"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_rule_is_seen(broken: str) -> None:
    name, layout, what = BREAKS[broken]
    found, truth = run(name, layout, f"tests/cpu/test_parity_mla.py:{broken}")
    assert max(differences(found, truth, (what,)).values()) > 10 * TOLERANCE


@contextmanager
def without_sum_of_shared_key() -> Iterator[None]:
    from mswift.parallel.megatron import mla

    with patch.object(mla, "copy_to_tensor_model_parallel_region", lambda x, group: x):
        yield


@contextmanager
def without_sum_of_shared_key_of_a_sequence() -> Iterator[None]:
    from mswift.parallel.megatron import mla

    gather = mla.gather_from_sequence_parallel_region
    with patch.object(
        mla,
        "gather_from_sequence_parallel_region",
        lambda x, group: gather(x, tensor_parallel_output_grad=False, group=group),
    ):
        yield


@contextmanager
def without_marks_on_down_projections() -> Iterator[None]:
    from mswift.parallel.megatron.linears import DuplicatedLinear

    make = DuplicatedLinear.__init__

    def unmarked(self: Any, *args: Any) -> None:
        make(self, *args)
        self.weight.sequence_parallel = False

    with patch.object(DuplicatedLinear, "__init__", unmarked):
        yield


@contextmanager
def without_yarn_in_the_softmax() -> Iterator[None]:
    from mswift.parallel.megatron import mla

    make = mla.SdpaAttention
    with patch.object(mla, "SdpaAttention", lambda config, softmax_scale, **groups: make(config, **groups)):
        yield


@contextmanager
def with_the_norm_of_the_model() -> Iterator[None]:
    from mswift.parallel.megatron import mla

    make = mla.RMSNorm
    with patch.object(mla, "RMSNorm", lambda config, hidden_size, eps: make(config, hidden_size, 1e-3)):
        yield


@contextmanager
def with_halves_for_pairs() -> Iterator[None]:
    from mswift.parallel.megatron import mla

    rotate = mla.rotate
    with patch.object(mla, "rotate", lambda x, cos, sin, interleaved: rotate(x, cos, sin)):
        yield
