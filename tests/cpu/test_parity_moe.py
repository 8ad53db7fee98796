"""Promise 2 for mixtures of experts: any layout computes what transformers computes.

fp32; logits, loss, gradient norm, every gradient, and weights after three steps of SGD at most 1e-5 apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from mswift.errors import LayoutError
from tests.support.family_configs import family_config
from tests.support.parity import VOCAB, differences, megatron_run, model_of, random_steps, reference
from tests.support.spaces import weights_of

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "tp2-sp-etp1": (2, {"tp": 2, "sequence_parallel": True, "etp": 1}),
    "tp2-sp-etp1-ep2": (2, {"tp": 2, "sequence_parallel": True, "etp": 1, "ep": 2}),
    "etp2": (2, {"etp": 2}),
    "pp2": (2, {"pp": 2}),
    "ep2": (2, {"ep": 2}),
    "dp2": (2, {}),
    "tp2-sp-ep2": (4, {"tp": 2, "sequence_parallel": True, "ep": 2}),
    "pp2-ep2": (4, {"pp": 2, "ep": 2}),
    "dp4-ep2": (4, {"ep": 2}),
}
SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}
ADAM = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0}
FIRST = ("logits", "loss", "grad_norm", "gradients")
TOLERANCE = 1e-5
WINDOW = "mixtral with a window"
FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "glm4_moe")


@cache
def expected(family: str, num_microbatches: int, optimizer: str) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """(config.json, start weights, what transformers computes)."""
    changes = {"sliding_window": 9} if family == WINDOW else {}  # of 24 tokens
    model = model_of(family_config(family.split()[0], vocab_size=VOCAB, num_hidden_layers=2, **changes))
    start = {n: w.copy() for n, w in weights_of(model).items()}
    settings = SGD if optimizer == "sgd" else ADAM
    return model.config.to_dict(), start, reference(model, random_steps(num_microbatches=num_microbatches), settings)


def run(family: str, layout: str, optimizer: str = "sgd", broken: str | None = None) -> tuple[Any, Any]:
    """(Megatron's results, transformers' results) of three steps."""
    num_microbatches = 4 if layout.startswith("dp4") else 2
    config, start, truth = expected(family, num_microbatches, optimizer)
    world_size, degrees = LAYOUTS[layout]
    steps = random_steps(num_microbatches=num_microbatches)
    settings = SGD if optimizer == "sgd" else ADAM
    return megatron_run(config, start, steps, settings, world_size, degrees, broken), truth


CASES = [(family, layout) for family in FAMILIES for layout in ("one", "tp2-sp", "pp2", "ep2", "dp2")]
CASES.remove(("gpt_oss", "tp2-sp"))  # experts with biases are not cut
CASES += [("gpt_oss", "tp2-sp-etp1"), ("gpt_oss", "tp2-sp-etp1-ep2")]
CASES += [("qwen2_moe", "tp2-sp-etp1"), ("qwen2_moe", "etp2"), ("qwen2_moe", "dp4-ep2")]
CASES += [("glm4_moe", "tp2-sp-ep2"), ("glm4_moe", "tp2-sp-etp1-ep2"), ("qwen3_moe", "pp2-ep2"), (WINDOW, "tp2-sp")]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_three_steps_of_sgd_equal_transformers(family: str, layout: str) -> None:
    found, truth = run(family, layout)
    apart = differences(found, truth, (*FIRST, "weights", "momentum_buffer"))
    assert {n: d for n, d in apart.items() if not d <= TOLERANCE} == {}
    loss_sum, weight_sum = found["evaluated"]
    assert loss_sum / weight_sum == pytest.approx(truth["loss"][0], rel=1e-5)


def test_three_steps_of_adam_equal_transformers() -> None:
    """Both optimizers of the chain, their states and one gradient norm."""
    found, truth = run("qwen2_moe", "tp2-sp-ep2", "adam")
    apart = differences(found, truth, (*FIRST, "exp_avg", "exp_avg_sq"))
    assert {n: d for n, d in apart.items() if not d <= TOLERANCE} == {}


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """The attribute replaced on this rank."""
    from unittest.mock import patch

    with patch.object(owner, name, value):
        yield


def experts_counted_as_dense() -> Any:
    """megatron-core 0.16's own rule: without expert parallelism, their gradients are summed like dense ones."""
    from mswift.parallel.megatron import model

    return patched(model, "mark_experts", lambda _model: None)


def no_sum_over_experts_replicas() -> Any:
    """The reduction of the experts' buffers left out."""
    from mswift.parallel.megatron.data_parallel import DataParallel

    def dense_only(self: Any, force_all_reduce: bool | None = False) -> None:
        for group in self.bucket_groups:
            group.finish_grad_sync(force_all_reduce=force_all_reduce)

    return patched(DataParallel, "finish_grad_sync", dense_only)


def changed_route(**changes: Any) -> Any:
    """Routing of another mixture."""
    from mswift.parallel.megatron import moe

    route = moe.route
    return patched(moe, "route", lambda logits, correction, spec: route(logits, correction, replace(spec, **changes)))


def no_renormalisation() -> Any:
    """Weights of the chosen experts that do not sum to one."""
    return changed_route(normalize=False)


def softmax_over_all() -> Any:
    """Weights among all experts instead of among the chosen ones."""
    return changed_route(score="softmax", normalize=False)


def no_groups() -> Any:
    """Experts chosen from all groups."""
    return changed_route(num_groups=1)


def no_scale() -> Any:
    """Weights without routed_scaling_factor."""
    return changed_route(scale=1.0)


def no_correction_bias() -> Any:
    """Experts chosen by their scores alone."""
    from mswift.parallel.megatron import moe

    route = moe.route
    return patched(moe, "route", lambda logits, _correction, spec: route(logits, None, spec))


def gate_and_up_exchanged() -> Any:
    """The halves of the experts' first linear."""
    from mswift.parallel.activations import QuickGlu

    forward = QuickGlu.forward
    return patched(QuickGlu, "forward", lambda self, x: forward(self, x.roll(x.shape[-1] // 2, -1)))


def no_clamp() -> Any:
    """Gate and up as they come."""
    from mswift.parallel import activations

    make = activations.activation_class
    from mswift.parallel.megatron import moe

    return patched(moe, "activation_class", lambda spec: make(replace(spec, swiglu_limit=None)))


def no_sinks() -> Any:
    """A softmax over the keys alone."""
    from mswift.parallel.attention.core import SdpaAttention
    from mswift.parallel.megatron.self_attention import SinkAttention

    return patched(SinkAttention, "forward", SdpaAttention.forward)


def no_window() -> Any:
    """Every position sees all before it."""
    from mswift.parallel.attention import core

    scores = core.Scores
    return patched(core, "Scores", lambda scale, _window, softcap: scores(scale, None, softcap))


def no_shared_gate() -> Any:
    """The shared expert's output as it comes."""
    import torch

    return patched(torch.nn.functional, "sigmoid", torch.ones_like)


def no_router_sum() -> Any:
    """Gradients of routers (and norms) left as each tensor-parallel rank sees them."""
    from importlib import import_module

    finalize = import_module("megatron.core.distributed.finalize_model_grads")
    return patched(finalize, "_allreduce_non_tensor_model_parallel_grads", lambda *_, **__: None)


BREAKS: dict[str, tuple[str, str, str]] = {
    "no_sum_over_experts_replicas": ("qwen3_moe", "dp2", "gradients"),
    "no_renormalisation": ("qwen3_moe", "one", "logits"),
    "softmax_over_all": ("gpt_oss", "one", "logits"),
    "no_groups": ("glm4_moe", "one", "logits"),
    "no_scale": ("glm4_moe", "one", "logits"),
    "no_correction_bias": ("glm4_moe", "one", "logits"),
    "gate_and_up_exchanged": ("gpt_oss", "one", "logits"),
    "no_clamp": ("gpt_oss", "one", "logits"),
    "no_sinks": ("gpt_oss", "one", "logits"),
    "no_window": (WINDOW, "one", "logits"),
    "no_shared_gate": ("qwen2_moe", "one", "logits"),
    "no_router_sum": ("qwen3_moe", "tp2-sp", "gradients"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_rule_is_seen(broken: str) -> None:
    family, layout, what = BREAKS[broken]
    found, truth = run(family, layout, broken=f"tests/cpu/test_parity_moe.py:{broken}")
    assert max(differences(found, truth, (what,)).values()) > 10 * TOLERANCE


def test_experts_counted_as_dense_are_seen() -> None:
    """Two ranks each take a half of every tensor of the experts for theirs, of which each has summed its own part."""
    with pytest.raises(LayoutError, match=r"mlp\.experts\..* written 2 to 2 times"):
        run("qwen2_moe", "tp2-sp-etp1", broken="tests/cpu/test_parity_moe.py:experts_counted_as_dense")
