"""Engines between their passes: what a pass leaves in memory, how long a group waits, what goes on from a file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mswift.tuners.lisa import LayerSampling
from tests.support.parity import VOCAB, random_model, random_steps
from tests.support.ranks import join, run_ranks

HERE = "tests/cpu/test_fsdp_engine.py"
SAMPLING = LayerSampling(num_layers=2, num_active=1, interval=1, seed=0)
"""Another layer in the second update."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    model: Any = random_model("qwen3", num_hidden_layers=2, vocab_size=VOCAB)
    model.save_pretrained(folder / "model")
    return folder


def microbatches(number: int = 0) -> list[Any]:
    """Those of one step."""
    from mswift.parallel.batch import Microbatch

    return [Microbatch(*batch) for batch in random_steps(3, 2)[number]]


# -- parameters that a pass without a backward one has gathered


@pytest.fixture(scope="module")
def kept(home: Path) -> dict[str, Any]:
    (found,) = run_ranks(1, f"{HERE}:with_layers_kept", home)
    return found  # type: ignore[no-any-return]


def with_layers_kept(home: Path) -> dict[str, Any]:
    """EVA and a step; a step of LISA, an evaluation, a step with another layer: layers let go of forward, and kept."""
    from mswift.converters.reader import WeightReader
    from mswift.tuners.data_start import DataStart
    from mswift.tuners.lora import LoraConfig
    from tests.support.engines import make_engine

    dims, device = join(1)
    reader, found = WeightReader(home / "model"), {}
    lora = LoraConfig.for_table(reader.table, rank=4, alpha=32, target_modules=("q_proj",), init="eva", seed=7)
    assert SAMPLING.active_at(0) != SAMPLING.active_at(1)
    for reshard in (True, False):
        own = {"backend": "fsdp", "dtype": "BF16", "lr": 0.05, "optimizer": "sgd", "reshard_after_forward": reshard}
        engine = make_engine(reader.table, dims, own | {"lora": lora}, device)
        engine.load_weights(reader)
        engine.start_from_data([microbatches()], DataStart("eva", tau=-1.0))
        found["eva", reshard] = engine.train_step(microbatches(), 0.05).grad_norm
        engine.close()
        engine = make_engine(reader.table, dims, own | {"lisa": SAMPLING}, device)
        engine.load_weights(reader)
        engine.train_step(microbatches(), 0.05)
        engine.evaluate(microbatches())
        found["lisa", reshard] = engine.train_step(microbatches(1), 0.05).grad_norm
        found["state", reshard] = {shard.key for shard in engine.optimizer_shards()}
        before = engine.logits(microbatches()[0].tokens)
        engine.load_weights(reader)
        found["logits", reshard] = (before - engine.logits(microbatches()[0].tokens)).abs().max().item()
        engine.close()
    return found


@pytest.mark.parametrize("what", ["eva", "lisa", "state"])
def test_layers_that_are_kept_after_forward_change_no_number(kept: dict[str, Any], what: str) -> None:
    """The first step after EVA has its A; after an evaluation the layer that LISA has drawn is trained."""
    assert kept[what, False] == kept[what, True]


def test_a_pass_sees_weights_that_were_loaded_after_another_pass(kept: dict[str, Any]) -> None:
    assert kept["logits", True] == kept["logits", False] > 0


# -- groups


@pytest.mark.parametrize("settings", [{"backend": "fsdp", "shard_size": 1}, {"backend": "deepspeed"}])
def test_every_group_waits_as_long_as_the_run_says(home: Path, settings: dict[str, Any]) -> None:
    for seconds in run_ranks(2, f"{HERE}:patience", {"home": home, "settings": settings}):
        assert len(seconds) >= 1
        assert set(seconds) == {7200.0}


def patience(payload: Mapping[str, Any]) -> list[float]:
    """Seconds of the groups that an engine makes; sequences are shared."""
    import torch.distributed as dist

    from mswift.converters.reader import WeightReader
    from tests.support.engines import make_engine

    dims, device = join(2, cp=2)
    table = WeightReader(payload["home"] / "model").table
    own = payload["settings"] | {"timeout_seconds": 7200.0}
    own |= {"deepspeed": "zero2"} if own["backend"] == "deepspeed" else {}
    engine = make_engine(table, dims, own, device)
    groups = set(engine._groups) - {dist.group.WORLD}
    found = [group._get_backend(device).options._timeout.total_seconds() for group in groups]
    engine.close()
    return found


# -- state


@pytest.mark.parametrize("backend", ["fsdp", "deepspeed", "megatron"])
def test_sgd_without_momentum_has_no_state_and_goes_on(home: Path, tmp_path: Path, backend: str) -> None:
    settings = {"backend": backend} | ({"deepspeed": "zero1"} if backend == "deepspeed" else {})
    (found,) = run_ranks(1, f"{HERE}:without_momentum", {"home": home, "run": tmp_path, "settings": settings})
    assert found["keys"] == set()
    assert found["bytes"] == 0
    assert found["again"] == found["whole"]


def without_momentum(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Losses of the second and third step, and those after a checkpoint of the first."""
    from mswift.converters.reader import WeightReader
    from mswift.train import checkpoint
    from tests.support.engines import make_engine
    from tests.support.methods import _save

    dims, device = join(1)
    reader = WeightReader(payload["home"] / "model")
    own = payload["settings"] | {"optimizer": "sgd", "sgd_momentum": 0.0, "lr": 0.05}
    engine = make_engine(reader.table, dims, own, device)
    engine.load_weights(reader)
    engine.train_step(microbatches(), 0.05)
    saved = _save(engine, reader, payload["run"])
    keys, held = {shard.key for shard in engine.optimizer_shards()}, engine.held_bytes()[1]
    whole = [engine.train_step(microbatches(n), 0.05).loss for n in (1, 2)]
    checkpoint.load(engine, saved, 0, 1)
    again = [engine.train_step(microbatches(n), 0.05).loss for n in (1, 2)]
    engine.close()
    masters = 4 * held.elements if payload["settings"]["backend"] == "deepspeed" else 0
    return {"keys": keys, "bytes": held.optimizer - masters, "whole": whole, "again": again}


def test_constants_of_an_adapter_are_those_of_a_model_that_has_moved(home: Path) -> None:
    """On a GPU buffers become other tensors; what an adapter's file says of them is for those that compute."""
    (found,) = run_ranks(1, f"{HERE}:moved", home)
    assert found
    assert all(found.values())


def moved(home: Path) -> dict[str, bool]:
    """VeRA's projections: whether a change of the constants is one of the model's buffers."""
    from mswift.converters.reader import WeightReader
    from mswift.parallel.fsdp.config import FsdpConfig
    from mswift.parallel.fsdp.tuned import tuned_model
    from mswift.tuners.method import MethodConfig

    _, device = join(1)
    table = WeightReader(home / "model").table
    method = MethodConfig.for_table(table, "vera", target_modules=("q_proj",), fields={"r": 4})
    tuned = tuned_model(table, FsdpConfig(method=method), device)
    for owner in tuned.model.modules():
        owner._buffers.update({key: None if b is None else b.clone() for key, b in owner._buffers.items()})
    assert tuned.method is not None
    for tensor in tuned.method.constants().values():
        tensor.fill_(7)
    live = {name: buffer for name, buffer in tuned.model.named_buffers() if "vera_" in name}
    return {name: bool((buffer == 7).all()) for name, buffer in live.items()}


# -- noise


def test_noise_on_packed_embeddings_is_the_same_where_documents_are_padded(home: Path) -> None:
    """Ranks that share a sequence pad each document; its length, by which the noise goes, is that before."""
    layouts = [("fsdp", 1, {}), ("fsdp", 2, {"cp": 2}), ("megatron", 2, {"cp": 2})]
    layouts.append(("megatron", 2, {"tp": 2, "sequence_parallel": True}))
    one, *others = [
        run_ranks(size, f"{HERE}:noisy", {"home": home, "size": size, "backend": backend, "dims": dims})[0]
        for backend, size, dims in layouts
    ]
    for found in others:
        assert np.allclose(one["plain"], found["plain"], rtol=5e-6, atol=0)
        assert np.allclose(one["noisy"], found["noisy"], rtol=5e-6, atol=0)
    assert abs(one["plain"] - one["noisy"]) > 1e-3


def noisy(payload: Mapping[str, Any]) -> dict[str, float]:
    """Losses of a packed row of odd documents, with noise and without."""
    from mswift.converters.reader import WeightReader
    from tests.support.engines import make_engine

    backend, size = payload["backend"], payload["size"]
    dims, device = join(size, **payload["dims"])
    reader, batch = WeightReader(payload["home"] / "model"), microbatches()[0]
    row = {name: getattr(batch, name)[:1] for name in ("tokens", "labels", "loss_weights")}
    batch, found = replace(batch, **row, documents=(5, 13, 6), rows=(0,)), {}
    assert torch.count_nonzero(batch.loss_weights)
    for name, alpha in (("plain", 0.0), ("noisy", 15.0)):
        own = {"shard_size": size} if backend == "fsdp" else {}
        engine = make_engine(reader.table, dims, own | {"backend": backend, "neftune_alpha": alpha}, device)
        engine.load_weights(reader)
        found[name] = engine.train_step([batch], 0.0).loss
        engine.close()
    return found
