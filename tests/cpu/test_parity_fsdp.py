"""Promise 2 for the engine of transformers models: any ranks, any share of a sequence, packed or not, one function.

fp32; loss, gradient norm, every gradient and three updates at most 1e-5 from transformers, 5e-6 from one rank
(max|a - b| / max|b| per tensor).
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mswift.tuners.lora import LoraConfig
from mswift.tuners.part import Part
from tests.support.adapters import table_of
from tests.support.family_configs import FAMILY_CONFIGS, REMOTE_CODE, family_config
from tests.support.lora_parity import mswift_run, peft_run
from tests.support.parity import (
    MODELS,
    VOCAB,
    differences,
    megatron_run,
    model_of,
    random_model,
    random_steps,
    reference,
)  # fmt: skip
from tests.support.ranks import run_ranks
from tests.support.spaces import weights_of

SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}
ADAM: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0}
WHAT = ("logits", "loss", "grad_norm", "gradients", "weights")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "full-2": (2, {"shard_size": 2}),
    "hybrid-2x2": (4, {"shard_size": 2}),
    "none-2": (2, {"shard_size": 1}),
}
SEQUENCES: dict[str, tuple[int, dict[str, Any], str]] = {
    "ring-2": (2, {"cp": 2}, "p2p"),
    "ulysses-2": (2, {"cp": 2}, "a2a"),
    "ulysses-4": (4, {"cp": 4}, "a2a"),
    "ulysses-2 x ring-2": (4, {"cp": 4, "cp_levels": (2, 2)}, "a2a+p2p"),
    "ring-2 x data-2": (4, {"cp": 2}, "p2p"),
}
DOCUMENTS = ((5, 11, 1, 7), (24,), (9, 15), (2, 2, 20))
"""Lengths of what is packed in the rows of 24 positions."""


@cache
def start(name: str) -> tuple[dict[str, Any], Any]:
    """(config.json, weights) of a random model."""
    model = random_model(name)
    return model.config.to_dict(), {n: w.copy() for n, w in weights_of(model).items()}


@cache
def truth(name: str) -> dict[str, Any]:
    """What transformers computes."""
    return reference(random_model(name), random_steps(num_microbatches=4), SGD)


def run(name: str, world_size: int, dims: Mapping[str, Any], steps: Any = None, **settings: Any) -> dict[str, Any]:
    """The same job by the engine under test."""
    steps = random_steps(num_microbatches=4) if steps is None else steps
    return megatron_run(
        *start(name), steps, SGD | {"backend": "fsdp", "shard_size": world_size} | settings, world_size, dims
    )


def worst(found: Mapping[str, Any], wanted: Mapping[str, Any], limit: float, what: Any = WHAT) -> dict[str, float]:
    """What lies further apart."""
    return {name: value for name, value in differences(found, wanted, what).items() if not value <= limit}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama-4-groups", "qwen3-tied"])
def test_equals_transformers(name: str, layout: str) -> None:
    world_size, settings = LAYOUTS[layout]
    found = run(name, world_size, {}, **settings)
    assert worst(found, truth(name), 1e-5, (*WHAT, "momentum_buffer")) == {}


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"llama-4-groups", "qwen3-tied"}))
def test_every_dense_model(name: str) -> None:
    assert worst(run(name, 2, {}), truth(name), 1e-5) == {}


OTHER_NAMES = {"nemotron_h"}
"""In files; they have tests of their own (tests/cpu/test_parity_ssm.py)."""


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS.keys() - REMOTE_CODE - OTHER_NAMES - {*MODELS}))
def test_every_other_family(family: str) -> None:
    model = model_of(family_config(family, vocab_size=VOCAB))
    weights = {name: weight.copy() for name, weight in weights_of(model).items()}
    steps = random_steps(1)
    wanted = reference(model, steps, SGD)
    own = SGD | {"backend": "fsdp", "shard_size": 2}
    found = megatron_run(model.config.to_dict(), weights, steps, own, 2, {})
    assert worst(found, wanted, 1e-5) == {}


def test_mixtral_as_its_files_name_it(tmp_path: Path) -> None:
    """transformers saves Mixtral under other names than it computes with; the step is the same, bit for bit."""
    model = model_of(family_config("mixtral", vocab_size=VOCAB))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any(".block_sparse_moe.experts.0.w1." in name for name in stored)
    steps, own = random_steps(1), SGD | {"backend": "fsdp", "shard_size": 2}
    config = model.config.to_dict()
    ours, theirs = (megatron_run(config, weights, steps, own, 2, {}) for weights in (weights_of(model), stored))
    assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model.layers.0.mixer.extra": (4,)},
            "parameter model.layers.0.mixer.extra .* is no tensor of the checkpoint",
        ),
        ({"model.norm_f.weight": (31,)}, r"model.norm_f.weight \[31\] is no tensor of the checkpoint"),
        ({"lm_head.weight": (VOCAB, 31)}, r"lm_head.weight .* is \[1003, 32\] in the checkpoint"),
        ({"model.layers.3.mixer.experts.up_proj": None}, "no parameter for .*experts.0.up_proj.weight"),
    ],
)
def test_what_transformers_models_hold_otherwise_is_refused(changes: dict[str, Any], words: str) -> None:
    from mswift.converters.plan import table_for
    from mswift.errors import ConfigError
    from mswift.parallel.fsdp.model import empty_model, saved_buffers
    from mswift.parallel.fsdp.pieces import map_parameters

    table = table_for(family_config("nemotron_h", vocab_size=VOCAB))
    model = empty_model(table, torch.float32)
    held = {name: tuple(p.shape) for name, p in (*model.named_parameters(), *saved_buffers(model).items())}
    assert set(map_parameters(held, table)) == set(held)
    shapes = {name: shape for name, shape in (held | changes).items() if shape is not None}
    with pytest.raises(ConfigError, match=f"--backend fsdp: transformers.*{words}.* use --backend megatron"):
        map_parameters(shapes, table)


def test_adam_updates_as_torch_does() -> None:
    """Adam turns 1e-7 of gradient noise into steps of size lr where a gradient is near zero: norms are compared."""
    steps = random_steps(num_microbatches=4)
    wanted = reference(random_model("llama"), steps, ADAM)
    found = run("llama", 2, {}, steps, **ADAM, optimizer="adam")
    assert worst(found, wanted, 1e-5, ("loss", "grad_norm")) == {}
    for name, weights in wanted["weights"].items():
        moved = np.linalg.norm(weights - start("llama")[1][name])
        assert np.linalg.norm(weights - found["weights"][name]) <= 1e-3 * moved, name


def packed_steps() -> Any:
    """Three steps of two microbatches of two packed rows."""
    pairs = (DOCUMENTS[:2], DOCUMENTS[2:])
    return [[(*b, rows[0] + rows[1]) for b, rows in zip(s, pairs, strict=True)] for s in random_steps()]


@cache
def one_rank(packed: bool) -> dict[str, Any]:
    return run("llama-4-groups", 1, {}, packed_steps() if packed else random_steps())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", SEQUENCES)
def test_ranks_that_share_sequences_compute_what_one_computes(layout: str, packed: bool) -> None:
    world_size, dims, kind = SEQUENCES[layout]
    steps = packed_steps() if packed else random_steps()
    found = run("llama-4-groups", world_size, dims, steps, cp_comm_type=kind)
    assert worst(found, one_rank(packed), 5e-6) == {}


def test_packed_documents_are_those_of_the_megatron_engine() -> None:
    wanted = megatron_run(*start("llama-4-groups"), packed_steps(), SGD, 1, {})
    assert worst(one_rank(True), wanted, 1e-5) == {}
    joined = [[batch[:3] for batch in step] for step in packed_steps()]
    assert max(differences(run("llama-4-groups", 1, {}, joined), wanted, ("gradients",)).values()) > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"recompute_blocks": 4},
        {"recompute_blocks": 4, "recompute_keeps_products": True},
        {"loss_fusion": "true"},
        {"reshard_after_forward": False},
        {"cpu_offload": True},
    ],
)
def test_computing_again_and_fusing_change_nothing(settings: dict[str, Any]) -> None:
    found = run("llama-4-groups", 2, {"cp": 2}, packed_steps(), **settings)
    assert worst(found, one_rank(True), 5e-6) == {}


@pytest.mark.parametrize("layout", ["full-2", "hybrid-2x2"])
def test_parameters_are_cut(layout: str) -> None:
    world_size, settings = LAYOUTS[layout]
    payload = {"start": start("qwen3-tied"), "world_size": world_size, "settings": settings}
    for rank, (placements, rows) in enumerate(run_ranks(world_size, "tests/cpu/test_parity_fsdp.py:placed", payload)):
        wanted = "(Shard(dim=0),)" if layout == "full-2" else "(Replicate(), Shard(dim=0))"
        assert placements == {wanted}, rank
        assert all(mine < whole for mine, whole in rows), rank


def placed(payload: Mapping[str, Any]) -> tuple[set[str], list[tuple[int, int]]]:
    """One rank: placements of all parameters; (rows here, rows in all) of each."""
    from tests.support.engines import make_engine
    from tests.support.ranks import join
    from tests.support.spaces import MemoryReader

    dims, device = join(payload["world_size"])
    reader = MemoryReader(*payload["start"])
    engine = make_engine(reader.table, dims, {"backend": "fsdp"} | payload["settings"], device)
    parameters = engine._weights.parameters.values()
    result = {str(tuple(p.placements)) for p in parameters}, [(len(p.to_local()), len(p)) for p in parameters]
    engine.close()
    return result


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return peft_run(tmp_path_factory.mktemp("lora"), "qwen3", TARGETS, ("embed_tokens", "lm_head"), rslora=True)


@pytest.mark.parametrize(
    ("world_size", "dims", "settings"),
    [(1, {}, {}), (2, {}, {"shard_size": 2}), (4, {"cp": 2}, {"shard_size": 2}), (2, {"cp": 2}, {"shard_size": 2})],
)
def test_lora_equals_peft(peft: dict[str, Any], world_size: int, dims: Any, settings: Any) -> None:
    found = mswift_run(peft["home"], world_size, dims, settings={"backend": "fsdp"} | settings)
    assert found["trainable"] == peft["trainable"]
    assert worst(found, peft, 1e-5, (*WHAT, "momentum_buffer")) == {}


@pytest.mark.parametrize("world_size", [1, 2])
def test_dora_equals_peft(tmp_path: Path, world_size: int) -> None:
    wanted = peft_run(tmp_path, "qwen2", TARGETS, dora=True)
    found = mswift_run(tmp_path, world_size, {}, settings={"backend": "fsdp", "shard_size": world_size})
    assert worst(found, wanted, 1e-5) == {}
    lora = LoraConfig.for_table(table_of(tmp_path / "model"), rank=4, alpha=8, target_modules=TARGETS, dora=True)
    ours, theirs = (
        mswift_run(tmp_path, n, {}, lora=lora, fresh=True, settings=own)["weights"]
        for n, own in ((world_size, {"backend": "fsdp", "shard_size": world_size}), (1, {}))
    )
    assert worst({"weights": ours}, {"weights": theirs}, 1e-6, ("weights",)) == {}


def test_fresh_adapters_start_as_the_megatron_engine_starts_them(peft: dict[str, Any], tmp_path: Path) -> None:
    found = mswift_run(peft["home"], 2, {}, settings={"backend": "fsdp", "shard_size": 2}, fresh=True)
    wanted = mswift_run(peft["home"], 1, {}, fresh=True)
    assert found["weights"].keys() == wanted["weights"].keys()
    assert all(np.array_equal(found["weights"][n], wanted["weights"][n]) for n in wanted["weights"])
    assert any(array.any() for name, array in found["weights"].items() if "lora_A" in name)


def test_bf16_keeps_fp32_weights() -> None:
    found = run("llama", 2, {}, dtype="BF16", **ADAM, optimizer="adam")
    wanted = reference(random_model("llama"), random_steps(num_microbatches=4), ADAM)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-2)
    assert all(w.dtype == np.float32 for w in found["weights"].values())
    assert torch.tensor(found["grad_norm"]).isfinite().all()


PART = Part(ratio=0.4, freeze=("model.layers.3.mlp",), trainable_regex=r"layers\.0\..*norm")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_part_of_the_model_is_trained(world_size: int) -> None:
    model = random_model("qwen3")
    frozen = PART.frozen({name: parameter.numel() for name, parameter in model.named_parameters()})
    assert (
        {"model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight"} < frozen < {*dict(model.named_parameters())}
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    steps = random_steps()
    wanted = reference(model, steps, SGD)
    found = run("qwen3", world_size, {}, steps, part=PART)
    assert worst(found, wanted, 1e-5, ("loss", "grad_norm", "weights")) == {}
    assert all(np.array_equal(found["weights"][name], start("qwen3")[1][name]) for name in frozen)


ENGINES: list[tuple[str, int, dict[str, Any]]] = [
    ("fsdp", 2, {}),
    ("fsdp", 2, {"cp": 2}),
    ("megatron", 1, {}),
    ("megatron", 2, {"tp": 2, "sequence_parallel": True}),
    ("megatron", 2, {"cp": 2}),
    ("megatron", 2, {"pp": 2}),
]


@pytest.mark.parametrize(("engine", "world_size", "dims"), ENGINES)
def test_noise_on_embeddings_is_the_same_on_any_engine_and_layout(engine: str, world_size: int, dims: Any) -> None:
    one = run("llama", 1, {}, random_steps(), neftune_alpha=5.0)
    own = {"shard_size": world_size} if engine == "fsdp" else {}
    settings = SGD | own | {"backend": engine, "neftune_alpha": 5.0}
    found = megatron_run(*start("llama"), random_steps(), settings, world_size, dims)
    assert worst(found, one, 5e-6) == {}
    assert one["evaluated"] == run("llama", 1, {}, random_steps())["evaluated"]
    assert abs(one["loss"][0] - truth_of_two()["loss"][0]) > 1e-3


@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_noise_is_on_what_transformers_embedding_gives(family: str) -> None:
    """Granite's model multiplies embeddings, and the noise on them; Gemma's embedding has multiplied before."""
    model = model_of(family_config(family, vocab_size=VOCAB))
    weights = {name: weight.copy() for name, weight in weights_of(model).items()}
    found, wanted = (
        megatron_run(model.config.to_dict(), weights, random_steps(1), SGD | own | {"neftune_alpha": 5.0}, 1, {})
        for own in ({"backend": "megatron"}, {"backend": "fsdp", "shard_size": 1})
    )
    assert worst(found, wanted, 1e-5) == {}


@cache
def truth_of_two() -> dict[str, Any]:
    return run("llama", 1, {}, random_steps())


def test_noise_is_uniform_in_the_bounds_of_neftune() -> None:
    from transformers.integrations.neftune import neftune_post_forward_hook

    from mswift.parallel import sequence
    from mswift.parallel.dropout import BatchPlace, at
    from mswift.parallel.fsdp.model import add_noise

    model, tokens, bounds = random_model("llama"), torch.zeros(3, 50, dtype=torch.long), []
    theirs = torch.nn.Embedding(4, 64)
    theirs.neftune_noise_alpha = 5.0
    with patch.object(torch.Tensor, "uniform_", lambda x, low, high: bounds.append(float(high)) or x):
        neftune_post_forward_hook(theirs, (tokens,), torch.zeros(3, 50, 64))
    plain = model.get_input_embeddings()(tokens)
    sequence.attending(None)
    add_noise(model, 5.0)
    with at(BatchPlace(1, 2, torch.arange(3), lengths=torch.tensor([[50.0]]))):
        noise = (model.get_input_embeddings()(tokens) - plain).flatten().double() / bounds[0]
    assert noise.abs().max() <= 1.001
    for bins in (2, 10):
        counts = torch.histc(noise, bins, -1, 1) / len(noise)
        assert (counts - 1 / bins).abs().max() < 0.02
    assert torch.equal(model.get_input_embeddings()(tokens), plain)
