"""LISA equals torch's AdamW on transformers' model with other layers frozen, step by step, at any layout."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from mswift.tuners.lisa import LayerSampling
from tests.support.parity import backward, differences, megatron_run, random_model, random_steps
from tests.support.ranks import run_ranks
from tests.support.spaces import assemble, weights_of

NAME = "llama-4-groups"
RULES: dict[str, dict[str, Any]] = {
    "adam": {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.95},
    "sgd": {"lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0, "optimizer": "sgd"},
}
SAMPLING = LayerSampling(num_layers=4, num_active=1, interval=2, seed=1)
STEPS = 7
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "copies": (2, {"shard_size": 1}),
    "cut, again": (2, {"shard_size": 2, "recompute_blocks": 4}),
}


@cache
def by_hand(rule: str) -> dict[str, Any]:
    """transformers and torch: layers of another choice are frozen, and their optimizer state is deleted."""
    model = random_model(NAME)
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if (p.dim() > 1) == decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    optimizer: torch.optim.Optimizer
    if rule == "adam":
        optimizer = torch.optim.AdamW(groups, lr=RULES[rule]["lr"], betas=(0.9, 0.95), eps=1e-8)
    else:
        optimizer = torch.optim.SGD(groups, lr=RULES[rule]["lr"], momentum=0.9)
    result: dict[str, Any] = {"loss": [], "grad_norm": [], "bytes": []}
    item = {"adam": 8, "sgd": 4}[rule]
    for update, step in enumerate(random_steps(STEPS)):
        for name, parameter in parameters.items():
            if ".layers." in name:
                parameter.requires_grad_(int(name.split(".")[2]) in SAMPLING.active_at(update))
                if not parameter.requires_grad:
                    optimizer.state.pop(parameter, None)
        optimizer.zero_grad()
        result["loss"].append(backward(model, step))
        result["grad_norm"].append(float(torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)))
        optimizer.step()
        result["bytes"].append(sum(item * p.numel() for p in parameters.values() if optimizer.state.get(p)))
    return result | {"weights": {name: w.copy() for name, w in weights_of(model).items()}}


def run(layout: str, rule: str) -> dict[str, Any]:
    world_size, settings = LAYOUTS[layout]
    model = random_model(NAME)
    own = RULES[rule] | {"backend": "fsdp", "lisa": SAMPLING} | settings
    return megatron_run(model.config.to_dict(), weights_of(model), random_steps(STEPS), own, world_size, {})


def test_choices_change_and_a_layer_comes_back() -> None:
    drawn = [next(iter(SAMPLING.active_at(update))) for update in range(0, STEPS, 2)]
    assert len(set(drawn)) > 1
    assert len(set(drawn)) < len(drawn)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_torch_with_other_layers_frozen(layout: str) -> None:
    found, wanted = run(layout, "sgd"), by_hand("sgd")
    worst = differences(found, wanted, ("loss", "grad_norm", "weights"))
    assert {name: value for name, value in worst.items() if not value <= 1e-5} == {}
    check_held(found, wanted, 1)


def check_held(found: dict[str, Any], wanted: dict[str, Any], tensors: int) -> None:
    """Optimizer state is there for what is trained now, and for nothing else."""
    held = sum(array.nbytes for array in assemble(found["states"]).values())
    assert held == wanted["bytes"][-1]
    assert held < 0.65 * sum(tensors * weight.nbytes for weight in wanted["weights"].values())


def test_adam_begins_anew_in_a_layer_that_comes_back() -> None:
    """Adam turns 1e-7 of gradient noise into steps of size lr where a gradient is near zero: norms are compared."""
    found, wanted = run("cut, again", "adam"), by_hand("adam")
    worst = differences(found, wanted, ("loss", "grad_norm"))
    assert {name: value for name, value in worst.items() if not value <= 1e-5} == {}
    start = weights_of(random_model(NAME))
    for name, weights in wanted["weights"].items():
        moved = np.linalg.norm(weights - start[name])
        assert np.linalg.norm(weights - found["weights"][name]) <= 1e-3 * moved, name
    check_held(found, wanted, 2)


def test_gradients_of_every_layer_are_reduced_in_fp32() -> None:
    for kinds in run_ranks(2, "tests/cpu/test_lisa.py:reduced", {"shard_size": 2}):
        assert kinds == {torch.float32}


def reduced(payload: Mapping[str, Any]) -> set[torch.dtype]:
    """One rank: the dtypes in which FSDP2 reduces gradients of layers, after steps with different ones."""
    from torch.distributed.fsdp import FSDPModule

    from mswift.parallel.batch import Microbatch
    from tests.support.engines import make_engine
    from tests.support.ranks import join
    from tests.support.spaces import MemoryReader

    dims, device = join(2)
    model = random_model(NAME)
    reader: Any = MemoryReader(model.config.to_dict(), weights_of(model))
    own = RULES["adam"] | {"backend": "fsdp", "lisa": SAMPLING, "dtype": "BF16"} | dict(payload)
    engine = make_engine(reader.table, dims, own, device)
    engine.load_weights(reader)
    for step in random_steps(5):
        engine.train_step([Microbatch(*batch) for batch in step][engine.coordinate.dp :: 2], 1e-3)
    modules = [module for module in engine._tuned.model.modules() if isinstance(module, FSDPModule)]
    found = {group._reduce_dtype for module in modules for group in module._get_fsdp_state()._fsdp_param_groups}
    engine.close()
    return found
