"""--optimizer of the engine of transformers models: three updates are those of the library by hand, at any layout.

The libraries get the very gradients of the run (clipped, whole), so that what is compared is the update alone.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np
import pytest
import torch

from mswift.config.optimizers import LIBRARIES, LowRank, state_bytes
from mswift.config.train import PtConfig
from mswift.topology import ParallelDims
from mswift.train.memory import fsdp_memory
from tests.support.parity import difference, random_model, random_steps
from tests.support.ranks import join, run_ranks
from tests.support.spaces import Arrays, MemoryReader, assemble, gather, read_array, to_hf, weights_of

LR, DECAY, RANK, GAP = 1e-2, 0.1, 8, 2
BETAS, EPS = (0.9, 0.95), 1e-8
LAYOUTS = {"one": (1, 1), "cut over two": (2, 2), "copies on two": (2, 1)}
"""(ranks, ranks that share parameters)"""
CASES = [
    pytest.param(optimizer, layout, marks=() if layout == "cut over two" or optimizer == "muon" else pytest.mark.whole)
    for optimizer in ("lion", "adafactor", "adamw_8bit", "muon", "galore", "q_galore", "apollo")
    for layout in LAYOUTS
]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def settings_of(optimizer: str) -> dict[str, Any]:
    own: dict[str, Any] = {}
    if optimizer in ("galore", "q_galore", "apollo"):
        own = {"galore_rank": RANK, "galore_update_proj_gap": GAP}
    if optimizer == "q_galore":
        optimizer, own = "galore", own | {"galore_quantization": True, "galore_queue_size": 1}
    return {"optimizer": optimizer, "lr": LR, "weight_decay": DECAY, "clip_grad": 1.0, **own}


def needed(optimizer: str) -> None:
    """Skip where its library is not installed."""
    if optimizer in LIBRARIES:
        pytest.importorskip(LIBRARIES[optimizer], reason="pip install 'mswift[optim]'")


@cache
def start(name: str = "llama") -> tuple[dict[str, Any], Arrays]:
    """(config.json, weights) of a random model."""
    model = random_model(name, num_hidden_layers=2)
    return model.config.to_dict(), {n: w.copy() for n, w in weights_of(model).items()}


@cache
def run(optimizer: str, layout: str, lora: bool = False) -> dict[str, Any]:
    """Gradients of every step, weights after three and six, state after three: assembled, by transformers' names."""
    world_size, shard_size = LAYOUTS[layout]
    settings = settings_of(optimizer) | {"backend": "fsdp", "shard_size": shard_size}
    ranks = run_ranks(world_size, on_rank, (start(), settings, world_size, lora))
    table = MemoryReader(*start()).table

    def named(part: str, number: int, prefix: str = "") -> Arrays:
        arrays = assemble([rank[part][number] for rank in ranks])
        arrays = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
        return {k.removeprefix("adapter."): a for k, a in arrays.items()} if lora else to_hf(arrays, table)

    return {
        "gradients": [named("gradients", n, "gradient.") for n in range(6)],
        "weights": [named("weights", n) for n in range(3)],
        "states": [rank["states"] for rank in ranks],
        "bytes": [rank["bytes"] for rank in ranks],
        "start": named("start", 0),
        "losses": ranks[0]["losses"],
        "resumed": [rank["resumed"] for rank in ranks],
    }


def on_rank(given: Any) -> dict[str, Any]:
    """One rank: six steps; and three, a new engine with what was saved, three."""
    (config, weights), settings, world_size, with_lora = given
    dims, device = join(world_size)
    from mswift.parallel.batch import Microbatch
    from mswift.tuners.lora import LoraConfig
    from tests.support.engines import make_engine

    reader = MemoryReader(config, weights)
    if with_lora:
        lora = LoraConfig.for_table(reader.table, rank=4, alpha=8, target_modules=TARGETS)
        settings = settings | {"lora": lora, "lora_b_lr_ratio": 16.0}
    steps = [[Microbatch(*batch) for batch in step] for step in random_steps(6, length=12)]
    found: dict[str, Any] = {"gradients": [], "weights": [], "losses": []}
    saved: dict[Any, Any] = {}

    def train(engine: Any, part: Sequence[Any]) -> None:
        for step in part:
            mine = step[engine.coordinate.dp :: dims.dp]
            found["losses"].append(engine.train_step(mine, LR).loss)
            found["gradients"].append(gather(engine.gradients()))

    def made(*, resumed: bool) -> Any:
        engine = make_engine(reader.table, dims, settings, device)
        if with_lora or not resumed:
            engine.load_weights(reader, resumed=resumed)
        return engine

    engine = made(resumed=False)
    found["start"] = [gather(engine.model_shards())]
    train(engine, steps[:3])
    found["weights"].append(gather(engine.model_shards()))
    for shard in (*engine.model_shards(), *engine.optimizer_shards()):
        saved[shard.key, shard.region] = shard.tensor.clone().numpy().reshape(shard.region.sizes)
    found["states"] = [(key, array) for (key, _), array in saved.items() if key.startswith("optimizer.")]
    found["bytes"] = engine.held_bytes()[1].optimizer
    train(engine, steps[3:])
    found["weights"].append(gather(engine.model_shards()))
    engine.close()
    engine = made(resumed=True)
    everything = _of_all(saved)
    engine.load_state(lambda key, region, out: read_array(everything[key], region, out), 3)
    found["gradients"] = found["gradients"][:6]
    train(engine, steps[3:])
    found["gradients"] = found["gradients"][:6]
    found["weights"].append(gather(engine.model_shards()))
    found["resumed"] = engine.optimizer_step
    engine.close()
    return found


def _of_all(saved: Mapping[Any, Any]) -> dict[str, Any]:
    """Whole tensors, from the boxes of all ranks."""
    from mswift.train.collective import gather_objects

    boxes: dict[str, list[Any]] = {}
    for of_rank in gather_objects(list(saved.items())):
        for (key, region), array in of_rank:
            boxes.setdefault(key, []).append((region, array))
    whole = {}
    for key, parts in boxes.items():
        ends = [tuple(o + s for o, s in zip(region.offsets, region.sizes, strict=True)) for region, _ in parts]
        whole[key] = np.zeros(tuple(map(max, zip(*ends, strict=True))), parts[0][1].dtype)
        for region, array in parts:
            box = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
            whole[key][box] = array
    return whole


# -- the same by hand


def by_hand(optimizer: str, given: Arrays, gradients: Sequence[Arrays], lr_of: Callable[[str], float]) -> Arrays:
    """`given` after an update from each of the gradients, by the library."""
    parameters = {name: torch.nn.Parameter(torch.from_numpy(array.copy())) for name, array in given.items()}
    special = {name for name, p in parameters.items() if _is_special(optimizer, name, p)}
    rules = _library(optimizer, {n: p for n, p in parameters.items() if n in special}, lr_of)
    rules += _library("adam", {n: p for n, p in parameters.items() if n not in special}, lr_of)
    for step in gradients:
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(step[name].copy())
        for rule in rules:
            rule.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def _is_special(optimizer: str, name: str, parameter: torch.Tensor) -> bool:
    if optimizer in ("muon", "galore", "apollo"):
        return parameter.dim() == 2 and ".layers." in name
    if optimizer == "adamw_8bit":
        return parameter.dim() == 2 and "embed_tokens" not in name
    return optimizer != "adam"


def _library(optimizer: str, parameters: Mapping[str, Any], lr_of: Callable[[str], float]) -> list[Any]:
    groups = [
        {"params": [p], "weight_decay": DECAY if p.dim() > 1 else 0.0, "lr": lr_of(n)} for n, p in parameters.items()
    ]
    if not groups:
        return []
    low_rank = {"rank": RANK, "update_proj_gap": GAP, "proj_type": "std"}
    if optimizer == "adam":
        return [torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)]
    if optimizer == "lion":
        from bitsandbytes.optim import Lion32bit

        return [Lion32bit(groups, lr=LR, betas=BETAS)]
    if optimizer == "adafactor":
        return [torch.optim.Adafactor(groups, lr=LR)]
    if optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return [AdamW8bit(groups, lr=LR, betas=BETAS, eps=EPS)]
    if optimizer == "muon":
        return [torch.optim.Muon(groups, lr=LR, momentum=0.95, adjust_lr_fn="match_rms_adamw")]
    if optimizer == "galore":
        from galore_torch import GaLoreAdamW

        own = [group | low_rank | {"scale": 0.25} for group in groups]
        return [GaLoreAdamW(own, lr=LR, betas=BETAS, eps=EPS, no_deprecation_warning=True)]
    from apollo_torch import APOLLOAdamW

    own = [group | low_rank | {"scale": 1.0, "proj": "random", "scale_type": "channel"} for group in groups]
    return [APOLLOAdamW(own, lr=LR, betas=BETAS, eps=EPS)]


def worst(found: Arrays, wanted: Arrays) -> tuple[float, str]:
    assert found.keys() == wanted.keys()
    return max((difference(found[name], wanted[name]), name) for name in wanted)


@pytest.mark.parametrize(("optimizer", "layout"), [case for case in CASES if case.values[0] != "q_galore"])
def test_three_updates_are_those_of_the_library(optimizer: str, layout: str) -> None:
    needed(optimizer)
    found = run(optimizer, layout)
    wanted = by_hand(optimizer, start()[1], found["gradients"][:3], lambda _: LR)
    assert worst(found["weights"][0], wanted) <= (2e-6, "")
    moved = {name: np.abs(wanted[name] - start()[1][name]).max() for name in wanted}
    assert min(moved.values()) > 1e-4
    noise = 1e-4 if optimizer == "muon" else 1e-5  # torch's Muon multiplies in bfloat16
    # weights that differ by 1e-7 give galore losses that differ by 6e-5 once old moments meet a new projection
    count = GAP + 1 if optimizer == "galore" else 6
    assert found["losses"][:count] == pytest.approx(run(optimizer, "cut over two")["losses"][:count], rel=noise)


@pytest.mark.parametrize(("optimizer", "layout"), CASES)
def test_six_steps_are_three_and_three(optimizer: str, layout: str) -> None:
    needed(optimizer)
    found = run(optimizer, layout)
    assert set(found["resumed"]) == {6}
    assert found["losses"][3:6] == found["losses"][6:9]
    again, whole = found["weights"][2], found["weights"][1]
    assert all(np.array_equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize(("optimizer", "layout"), CASES)
def test_state_is_what_the_dry_run_says(optimizer: str, layout: str) -> None:
    needed(optimizer)
    found, (world_size, shard_size) = run(optimizer, layout), LAYOUTS[layout]
    table = MemoryReader(*start()).table
    config = PtConfig(model="", backend="fsdp", fsdp_shard_size=shard_size, **settings_of(optimizer))
    said = fsdp_memory(config, table, ParallelDims(world_size=world_size), 4).optimizer_bytes
    assert sum(found["bytes"]) == said * world_size
    kept = sum(array.nbytes for states in found["states"] for _, array in states)
    assert kept == said * shard_size
    assert said < sum(state_bytes("adam", w.shape, LowRank(RANK)) for w in start()[1].values()) / shard_size


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param("lion", marks=pytest.mark.whole), "adafactor", pytest.param("adamw_8bit", marks=pytest.mark.whole)],
)
def test_adapters_with_a_faster_b(optimizer: str) -> None:
    needed(optimizer)
    found = run(optimizer, "cut over two", lora=True)
    wanted = by_hand(
        optimizer, found["start"], found["gradients"][:3], lambda name: LR * (16 if "lora_B" in name else 1)
    )
    assert worst(found["weights"][0], wanted) <= (2e-6, "")
    again, whole = found["weights"][2], found["weights"][1]
    assert all(np.array_equal(again[name], whole[name]) for name in whole)
    assert prod(whole[name].any() for name in whole)


def test_one_rank_keeps_the_state_of_a_matrix() -> None:
    found = run("muon", "cut over two")
    whole = [key for states in found["states"] for key, _ in states if ".of." in key]
    assert len(whole) == len(set(whole)) == 2 * 7
    assert "optimizer.momentum_buffer.of.model.layers.1.self_attn.q_proj.weight" in whole
    assert all(any(".of." in key for key, _ in states) for states in found["states"])
