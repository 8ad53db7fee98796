"""Recomputation gives the same gradients and keeps fewer bytes between forward and backward (saved-tensor hooks)."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch

from tests.cpu import test_parity_mla
from tests.support.family_configs import family_config
from tests.support.parity import BASE, VOCAB, difference, model_of, random_model, random_steps
from tests.support.ranks import join, run_ranks
from tests.support.spaces import MemoryReader, assemble, gather, weights_of

TOLERANCE = 5e-6
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "full uniform": ("qwen3", FULL, 0.5),
    "full uniform of 2": ("qwen3", FULL | {"recompute_num_layers": 2}, 0.5),
    "full block of 2": ("qwen3", FULL | {"recompute_method": "block", "recompute_num_layers": 2}, 0.8),
    "core_attn": ("gemma2", {"recompute_modules": ("core_attn",)}, 1.0),  # what is kept of it else is a log-sum-exp
    "layernorm": ("qwen3", {"recompute_modules": ("layernorm",)}, 0.95),
    "mlp and layernorm": ("qwen3", {"recompute_modules": ("mlp", "layernorm")}, 0.8),
    "moe": ("qwen2_moe", {"recompute_modules": ("moe",)}, 0.8),
    "shared experts": ("qwen2_moe", {"recompute_modules": ("shared_experts",)}, 0.98),
    "latent attention": ("dense", {"recompute_modules": ("core_attn",)}, 1.0),
}
"""Name -> (model, settings, share of the bytes of a plain run that it may keep)."""


class Kept:
    """Bytes of storages that autograd holds, as packed and not yet let go; weights are not counted."""

    def __init__(self) -> None:
        self.weights: set[int] = set()
        self.holders: weakref.WeakSet[Any] = weakref.WeakSet()

    def pack(self, tensor: torch.Tensor) -> Any:
        holder = _Holder(tensor)
        self.holders.add(holder)
        return holder

    def num_bytes(self) -> int:
        """Each storage once; what a recomputed norm gave up has none."""
        storages = [holder.tensor.untyped_storage() for holder in self.holders]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for pointer, size in sizes.items() if pointer not in self.weights)


class _Holder:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def on_rank(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Gradients of one step, and the bytes kept when its forward pass has ended."""
    dims, device = join(1)
    from unittest.mock import patch

    from mswift.parallel.megatron import ends, schedule
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine, Microbatch
    from mswift.tuners.lora import LoraConfig

    reader = MemoryReader(payload["config"], payload["weights"])
    settings = dict(payload["settings"])
    if payload["lora"]:
        settings["lora"] = LoraConfig.plain(4, 8.0, ("q_proj", "v_proj", "down_proj"), 3)
    kept, seen, loss = Kept(), [], schedule._weighted_loss

    def measured(*args: Any) -> Any:
        seen.append(kept.num_bytes())
        return loss(*args)

    @contextmanager
    def without_hook() -> Iterator[None]:
        with patch.object(ends, "_require_gradient", lambda _m, _a, output: output):
            yield

    with without_hook() if payload["broken"] else patch.object(schedule, "_weighted_loss", measured):
        engine = MegatronEngine(reader.table, dims, EngineConfig(optimizer="sgd", **settings), device)
        engine.load_weights(reader)  # type: ignore[arg-type]
        if payload["lora"]:
            with torch.no_grad():
                for placed in engine._trained:
                    placed.parameter.add_(0.1)
            engine._optimizer.reload_parameters()
        kept.weights = {p.untyped_storage().data_ptr() for chunk in engine._chunks for p in chunk.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda holder: holder.tensor):
            result = engine.train_step([Microbatch(*b) for b in random_steps()[0][:1]], 0.0)
        found = {"gradients": gather(engine.gradients()), "loss": result.loss, "kept": seen}
        engine.close()
    return found


@cache
def run(name: str, recompute: str | None, lora: bool = False, broken: bool = False) -> dict[str, Any]:
    match name:
        case "qwen2_moe":
            model = model_of(family_config(name, vocab_size=VOCAB, num_hidden_layers=2))
        case "dense":
            model = model_of(BASE | test_parity_mla.MODELS[name])
        case _:
            model = random_model(name)
    config = {k: v for k, v in model.config.to_dict().items() if v is not None}
    settings = dict(CASES[recompute][1]) if recompute else {}
    if "recompute_modules" in settings:
        settings["recompute_granularity"] = "selective"
    payload = {"config": config, "weights": weights_of(model), "settings": settings, "lora": lora, "broken": broken}
    return run_ranks(1, on_rank, payload)[0]  # type: ignore[no-any-return]


def worst(found: dict[str, Any], expected: dict[str, Any]) -> float:
    ours, truth = assemble([found["gradients"]]), assemble([expected["gradients"]])
    assert ours.keys() == truth.keys()
    return max(difference(ours[key], truth[key]) for key in truth)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same_and_fewer_bytes_are_kept(case: str) -> None:
    name, _, share = CASES[case]
    plain, found = run(name, None), run(name, case)
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert worst(found, plain) <= TOLERANCE
    assert 0 < found["kept"][0] < share * plain["kept"][0], (found["kept"], plain["kept"])


@pytest.mark.parametrize("case", ["full uniform", "mlp and layernorm"])
def test_adapters_of_a_frozen_model_get_their_gradients(case: str) -> None:
    assert worst(run("qwen3", case, lora=True), run("qwen3", None, lora=True)) <= TOLERANCE


def test_without_the_hook_on_the_embedding_adapters_get_none() -> None:
    assert worst(run("qwen3", "full uniform", lora=True, broken=True), run("qwen3", None, lora=True)) > 0.5
