"""Multi-token prediction: any layout computes what a plain model of the DeepSeek-V3 report computes.

fp32; losses, gradient norm, every gradient and every weight after the steps at most 5e-6 apart (max|a - b| / max|b| per
tensor); beside transformers' gated delta nets 1e-5, as in `test_parity_ssm.py`, of an fp64 model. The plain model:
`tests.support.prediction`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import cycle
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from tests.cpu.test_parity_mla import GROUPS, LATENT
from tests.cpu.test_parity_ssm import MODELS as RECURRENT
from tests.cpu.test_parity_ssm import TOLERANCE as TRANSFORMERS
from tests.cpu.test_parity_ssm import weaken_decay
from tests.support.parity import BASE, differences, megatron_run, random_steps
from tests.support.parity import reference as transformers_reference
from tests.support.prediction import in_double, predicting_model, published, reference
from tests.support.ranks import join, run_ranks
from tests.support.spaces import weights_of

TOLERANCE = 5e-6
SCALE = 0.3
V3 = BASE | LATENT | GROUPS | {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-6}
MODELS: dict[str, dict[str, Any]] = {
    "v3": V3,
    "two-depths": V3 | {"num_nextn_predict_layers": 2, "first_k_dense_replace": 0},
    "tied": V3 | {"tie_word_embeddings": True},
    "glm": BASE | {
        "model_type": "glm4_moe", "num_hidden_layers": 2, "head_dim": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1, "use_qk_norm": True, "partial_rotary_factor": 0.5,
    },
    "qwen3-next": RECURRENT["qwen3_next"] | {"num_hidden_layers": 2, "mlp_only_layers": []},
}  # fmt: skip
WIDE = ("qwen3-next",)
"""Compared with the plain model in fp64: in fp32 it is itself 5e-6 from that, so that two right runs are 1e-5 apart."""

SP = {"sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2-sp": (2, {"tp": 2, **SP}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"cp": 2}),
    "ep2": (2, {"ep": 2}),
    "tp2-sp-etp1-ep2": (2, {"tp": 2, "etp": 1, "ep": 2, **SP}),
}
SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0, "mtp_num_layers": 1}
WHAT = ("loss", "mtp_loss", "grad_norm", "gradients", "weights")
DOCUMENTS = (7, 1, 16, 2, 10, 12)


def steps(packed: bool) -> Any:
    if not packed:
        return random_steps(2)
    return [[(*batch, DOCUMENTS) for batch in step] for step in random_steps(2)]


@cache
def expected(name: str, packed: bool) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """(config.json, start weights, what the plain model computes)."""
    model: Any = predicting_model(MODELS[name])
    weaken_decay(model)
    config = {k: v for k, v in model.config.to_dict().items() if v is not None or k == "q_lora_rank"}
    start = {published(n, model): w.copy() for n, w in weights_of(model).items()}
    if name in WIDE:
        with in_double(model):
            wide = [[(tokens, labels, weights.double()) for tokens, labels, weights in step] for step in steps(packed)]
            truth = reference(model, wide, SGD, SCALE)
        assert {gradient.dtype for gradient in truth["gradients"].values()} == {np.dtype("float64")}
        return config, start, truth
    return config, start, reference(model, steps(packed), SGD, SCALE)


def apart(name: str, layout: str, packed: bool = False, broken: str | None = None, **settings: Any) -> dict[str, float]:
    """Differences of a run on a layout from the plain model."""
    config, start, truth = expected(name, packed)
    world_size, degrees = LAYOUTS[layout]
    depths = MODELS[name].get("num_nextn_predict_layers", 1)
    changed = SGD | {"mtp_num_layers": depths, "mcore": {"mtp_loss_scaling_factor": SCALE}} | settings
    found = megatron_run(config, start, steps(packed), changed, world_size, degrees, broken)
    return differences(found, truth, WHAT)


CASES = [("v3", layout) for layout in ("one", "tp2-sp", "pp2", "dp2", "cp2", "ep2")]
CASES += [("two-depths", "one"), ("tied", "pp2"), ("glm", "tp2-sp")]
CASES += [("qwen3-next", layout) for layout in ("one", "tp2-sp", "pp2")]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_two_steps_equal_the_plain_model(name: str, layout: str) -> None:
    tolerance = TRANSFORMERS if name in WIDE else TOLERANCE
    assert {n: d for n, d in apart(name, layout).items() if not d <= tolerance} == {}


@pytest.mark.parametrize("layout", [pytest.param("one", marks=pytest.mark.whole), "cp2"])
def test_no_target_lies_beyond_the_end_of_a_packed_document(layout: str) -> None:
    assert {n: d for n, d in apart("v3", layout, packed=True).items() if not d <= TOLERANCE} == {}


OPTIONS: dict[str, dict[str, Any]] = {
    "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "fused loss": {"loss_fusion": "true"},
}


@pytest.mark.parametrize("option", ["uniform", pytest.param("block", marks=pytest.mark.whole), "fused loss"])
def test_recomputation_and_fusion_change_nothing(option: str) -> None:
    assert {n: d for n, d in apart("v3", "one", **OPTIONS[option]).items() if not d <= TOLERANCE} == {}


def gradients_of_states(payload: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Gradients of random states [depths + 1] before the output layer: ours, and those of megatron-core's own code."""
    dims, device = join(1)
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    from mswift.converters.plan import table_for
    from mswift.parallel.batch import Microbatch, moved
    from mswift.parallel.megatron import schedule
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine
    from mswift.parallel.megatron.model import _weighted_sum
    from mswift.train.proof_tensors import RandomWeights

    table = table_for(payload["config"])
    settings = EngineConfig(mtp_num_layers=2, loss_fusion="false", mcore={"mtp_loss_scaling_factor": SCALE})
    engine = MegatronEngine(table, dims, settings, device)
    engine.load_weights(RandomWeights(table, 0))  # type: ignore[arg-type]
    model = engine._chunks[0].module
    tokens, labels, weights = random_steps(1)[0][0]
    batch = Microbatch(tokens, labels, weights)
    depths = [batch, *(moved(batch, depth) for depth in (1, 2))]
    start = torch.randn((3 * tokens.shape[1], len(tokens), table.spec.hidden_size))
    states = [start.clone().requires_grad_() for _ in range(3)]
    parts = zip(states[0].chunk(3), depths, strict=True)
    sums = [_weighted_sum(*model._losses(x, d.labels, d.loss_weights), d.loss_weights) for x, d in parts]
    schedule._of_sums(2, SCALE, torch.stack(sums), weights)[0].backward()
    rest = dict.fromkeys(("input_ids", "position_ids", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin"))
    MTPLossAutoScaler.set_loss_scale(torch.ones(()))
    for x, by_token in zip(states[1:], (True, False), strict=True):
        model.config.calculate_per_token_loss = by_token
        losses = GPTModel._postprocess(model, x, labels=labels, loss_mask=weights, **rest)
        (losses * weights).sum().backward()
    engine.close()
    counts = [float(depth.loss_weights.sum()) for depth in depths]
    names = ("ours", "by token", "mean")
    return {name: x.grad.numpy() for name, x in zip(names, states, strict=True)} | {"counts": np.array(counts)}


def test_losses_ahead_are_divided_as_megatron_core_divides_those_of_tokens_and_as_in_the_report() -> None:
    """A sum, later divided by the learned tokens T of the main loss (the report: 1/T), not by a depth's own targets.

    The latter is what megatron-core does to a loss that is a mean.
    """
    found = run_ranks(1, gradients_of_states, {"config": MODELS["two-depths"]})[0]
    ours, by_token, mean = (found[name].reshape(3, -1) for name in ("ours", "by token", "mean"))
    assert np.abs(ours - by_token).max() <= 1e-6 * np.abs(by_token).max()
    for depth in (1, 2):
        assert np.abs(ours[depth]).max() > 0
        assert np.allclose(mean[depth] * found["counts"][depth], ours[depth], rtol=1e-4, atol=1e-7)
        assert found["counts"][depth] < found["counts"][0]


WHOLE = [pytest.param(layout, marks=pytest.mark.whole) for layout in ("one", "tp2-sp", "dp2", "ep2")]


@pytest.mark.parametrize("layout", [*WHOLE, "pp2", "tp2-sp-etp1-ep2"])
def test_layers_that_are_not_trained_stay_bit_for_bit(layout: str) -> None:
    model: Any = predicting_model(V3)
    config, start, _ = expected("v3", False)
    truth = transformers_reference(model, steps(False), SGD)
    world_size, degrees = LAYOUTS[layout]
    found = megatron_run(config, start, steps(False), SGD | {"mtp_num_layers": 0}, world_size, degrees)
    what = ("loss", "grad_norm", "gradients", "weights")
    assert {n: d for n, d in differences(found, truth, what).items() if not d <= TOLERANCE} == {}
    ours = [name for name in start if name.startswith(f"model.layers.{V3['num_hidden_layers']}.")]
    assert len(ours) > 10
    assert [name for name in ours if found["weights"][name].tobytes() != start[name].tobytes()] == []


BREAKS = {
    "labels_not_moved": ("one", False, ""),
    "across_documents": ("one", True, ""),
    "scaled_on_each_rank": ("cp2", False, ""),
    "own_embedding_on_the_last_stage": ("pp2", False, ""),
    "recomputed_without_gradients": ("one", False, "uniform"),
    "added_up_once_more": ("one", False, "fused loss"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_rule_is_seen(broken: str) -> None:
    layout, packed, option = BREAKS[broken]
    found = apart("v3", layout, packed, f"tests/cpu/test_parity_mtp.py:{broken}", **OPTIONS.get(option, {}))
    assert max(d for name, d in found.items() if name.startswith("gradients")) > 10 * TOLERANCE


@contextmanager
def labels_not_moved() -> Iterator[None]:
    from dataclasses import replace

    from mswift.parallel import batch

    move = batch.moved
    with patch.object(batch, "moved", lambda one, depth: replace(move(one, depth), labels=one.labels)):
        yield


@contextmanager
def across_documents() -> Iterator[None]:
    from dataclasses import replace

    from mswift.parallel import batch

    def rows(one: Any, depth: int) -> Any:
        return replace(move(replace(one, documents=None), depth), documents=one.documents)

    move = batch.moved
    with patch.object(batch, "moved", rows):
        yield


@contextmanager
def scaled_on_each_rank() -> Iterator[None]:
    """As megatron-core has it for a loss that is a mean: divided by the targets of this rank, not by those of all."""
    import torch.distributed as dist

    from mswift.parallel.megatron import schedule

    ahead = schedule._ahead

    def normalised(part: Any, device: Any) -> Any:
        tokens, labels, weights = ahead(part, device)
        everywhere = weights.sum()
        dist.all_reduce(everywhere)
        return tokens, labels, weights / weights.sum() * everywhere / dist.get_world_size()

    with patch.object(schedule, "_ahead", normalised):
        yield


@contextmanager
def own_embedding_on_the_last_stage() -> Iterator[None]:
    from importlib import import_module

    finalize = import_module("megatron.core.distributed.finalize_model_grads")
    with patch.object(finalize, "_allreduce_word_embedding_grads", lambda *_, **__: None):
        yield


@contextmanager
def recomputed_without_gradients() -> Iterator[None]:
    """Only a layer that is recomputed at all is hit."""
    from mswift.parallel.megatron import prediction

    def cut(function: Any, _distribute: bool, *inputs: Any) -> Any:
        return function(*(each.detach().requires_grad_() for each in inputs))

    with patch.object(prediction, "checkpoint", cut):
        yield


@contextmanager
def added_up_once_more() -> Iterator[None]:
    """The loss further ahead, which comes second."""
    from mswift.parallel.megatron import model

    sum_of, factors = model._weighted_sum, cycle((1, 2))
    with patch.object(model, "_weighted_sum", lambda total, *rest: sum_of(total, *rest) * next(factors)):
        yield
