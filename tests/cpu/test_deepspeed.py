"""--backend deepspeed: ZeRO at any stage is transformers' model, in loss, gradients and updates, full and LoRA.

fp32; at most 1e-5 from transformers or PEFT and 5e-6 from one rank, max|a - b| / max|b| per tensor. What is saved after
three steps goes on bit for bit, at another number of ranks, and with another engine.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cpu.test_parity_fsdp import (
    ADAM,
    OTHER_NAMES,
    SEQUENCES,
    SGD,
    TARGETS,
    WHAT,
    one_rank,
    packed_steps,
    start,
    truth,
    worst,
)  # fmt: skip
from tests.support.family_configs import FAMILY_CONFIGS, REMOTE_CODE, family_config
from tests.support.lora_parity import mswift_run, peft_run
from tests.support.parity import VOCAB, difference, megatron_run, model_of, random_model, random_steps, reference
from tests.support.ranks import join, run_ranks
from tests.support.spaces import MemoryReader, assemble, gather, read_array, weights_of

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'mswift[deepspeed]'"
)

STAGES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def sample(*now: Any, of: Sequence[Any] = STAGES) -> list[Any]:
    """Those that `make test` runs; the others are for `make test-whole`."""
    return [pytest.param(each, marks=() if each in now else pytest.mark.whole) for each in of]


MODEL = "llama-4-groups"


def run(stage: str, world_size: int, dims: Mapping[str, Any], steps: Any = None, **settings: Any) -> dict[str, Any]:
    """A job of the engine under test."""
    steps = random_steps(num_microbatches=4) if steps is None else steps
    own = SGD | {"backend": "deepspeed", "deepspeed": stage} | settings
    return megatron_run(*start(MODEL), steps, own, world_size, dims)


@pytest.mark.parametrize("stage", sample("zero1", "zero2", "zero3"))
def test_equals_transformers(stage: str) -> None:
    found = run(stage, 2, {})
    assert worst(found, truth(MODEL), 1e-5, (*WHAT, "momentum_buffer")) == {}


@pytest.mark.whole
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_tied_embeddings(stage: str) -> None:
    own = SGD | {"backend": "deepspeed", "deepspeed": stage}
    found = megatron_run(*start("qwen3-tied"), random_steps(num_microbatches=4), own, 2, {})
    assert worst(found, truth("qwen3-tied"), 1e-5, (*WHAT, "momentum_buffer")) == {}


@pytest.mark.parametrize("family", sample("qwen3_moe", of=sorted(FAMILY_CONFIGS.keys() - REMOTE_CODE - OTHER_NAMES)))
def test_every_family(family: str) -> None:
    model = model_of(family_config(family, vocab_size=VOCAB))
    weights, steps = {name: weight.copy() for name, weight in weights_of(model).items()}, random_steps(1)
    own = SGD | {"backend": "deepspeed", "deepspeed": "zero3"}
    found = megatron_run(model.config.to_dict(), weights, steps, own, 2, {})
    assert worst(found, reference(model, steps, SGD), 1e-5) == {}


@pytest.mark.whole
@pytest.mark.parametrize("stage", STAGES[:3])
def test_adam_updates_as_torch_does(stage: str) -> None:
    """As with the other engines: norms are compared, since Adam makes steps of size lr of gradient noise."""
    steps = random_steps(num_microbatches=4)
    wanted, found = reference(random_model(MODEL), steps, ADAM), run(stage, 2, {}, steps, **ADAM, optimizer="adam")
    assert worst(found, wanted, 1e-5, ("loss", "grad_norm")) == {}
    for name, weights in wanted["weights"].items():
        moved = np.linalg.norm(weights - start(MODEL)[1][name])
        assert np.linalg.norm(weights - found["weights"][name]) <= 1e-3 * moved, name


@pytest.mark.whole
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("sharing", ["ring-2", "ulysses-2"])
def test_ranks_that_share_sequences_compute_what_one_computes(stage: str, sharing: str) -> None:
    world_size, dims, kind = SEQUENCES[sharing]
    found = run(stage, world_size, dims, packed_steps(), cp_comm_type=kind)
    assert worst(found, one_rank(True), 5e-6) == {}


@pytest.mark.parametrize("stage", sample("zero3"))
def test_computing_again_and_fusing_change_nothing(stage: str) -> None:
    found = run(stage, 2, {"cp": 2}, packed_steps(), recompute_blocks=4, loss_fusion="true")
    assert worst(found, one_rank(True), 5e-6) == {}


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return peft_run(tmp_path_factory.mktemp("lora"), "qwen3", TARGETS, ("embed_tokens", "lm_head"), rslora=True)


@pytest.mark.parametrize("stage", sample("zero3"))
def test_lora_equals_peft(peft: dict[str, Any], stage: str) -> None:
    found = mswift_run(peft["home"], 2, {}, settings={"backend": "deepspeed", "deepspeed": stage})
    assert found["trainable"] == peft["trainable"]
    assert worst(found, peft, 1e-5, (*WHAT, "momentum_buffer")) == {}


@pytest.mark.whole
def test_dora_equals_peft(tmp_path: Path) -> None:
    wanted = peft_run(tmp_path, "qwen3", TARGETS, dora=True)
    found = mswift_run(tmp_path, 2, {}, settings={"backend": "deepspeed", "deepspeed": "zero2"})
    assert worst(found, wanted, 1e-5) == {}


# -- what is cut, and what goes on


@cache
def story(stage: str, world_size: int, dtype: str = "F32", clip_grad: float = 1.0, batches: int = 4) -> dict[str, Any]:
    """Six steps, and three again from what was saved after three; the state after each half, whole. Stage "": ddp."""
    own = {"backend": "deepspeed", "deepspeed": stage} if stage else ENGINES["ddp"]
    settings = ADAM | {"optimizer": "adam", "dtype": dtype, "clip_grad": clip_grad} | own
    ranks = run_ranks(world_size, on_rank, (start(MODEL), settings, world_size, None, batches))
    states = [assemble([rank["states"][n] for rank in ranks]) for n in range(3)]
    return {"losses": ranks[0]["losses"], "states": states}


def on_rank(given: Any) -> dict[str, Any]:
    """One rank of a story with so many microbatches a step; `saved`: a state to begin with, after three steps."""
    (config, weights), settings, world_size, saved, batches = given
    dims, device = join(world_size)
    from mswift.parallel.batch import Microbatch
    from mswift.train.collective import gather_objects
    from tests.support.engines import make_engine

    reader = MemoryReader(config, weights)
    random = random_steps(6, num_microbatches=batches, batch=1, length=12)
    steps = [[Microbatch(*batch) for batch in step] for step in random]
    found: dict[str, Any] = {"losses": [], "states": []}

    def train(engine: Any, part: Any) -> None:
        for step in part:
            found["losses"].append(engine.train_step(step[engine.coordinate.dp :: dims.dp], ADAM["lr"]).loss)
        found["states"].append(gather([*engine.model_shards(), *engine.optimizer_shards()]))

    def go_on(state: Mapping[str, Any]) -> None:
        engine = make_engine(reader.table, dims, settings, device)
        if "method" in settings:
            engine.load_weights(reader, resumed=True)
        engine.load_state(lambda key, region, out: read_array(state[key], region, out), 3)
        train(engine, steps[3:])
        engine.close()

    if saved is not None:
        go_on(saved)
        return found
    engine = make_engine(reader.table, dims, settings, device)
    engine.load_weights(reader)
    train(engine, steps[:3])
    train(engine, steps[3:])
    engine.close()
    go_on(_as_saved(assemble(gather_objects(found["states"][0])), settings["dtype"]))
    return found


def _as_saved(state: Mapping[str, Any], dtype: str) -> Mapping[str, Any]:
    """`gather` gives fp32; weights of a BF16 run are read as bf16."""
    import torch

    if dtype == "F32":
        return state
    short = {key for key in state if not key.startswith("optimizer.")}
    return {k: torch.from_numpy(a).bfloat16().view(torch.int16).numpy() if k in short else a for k, a in state.items()}


STORIES = [(stage, dtype) for stage in STAGES for dtype in ("F32", "BF16")]


@pytest.mark.parametrize("case", sample(("zero2", "F32"), ("zero2", "BF16"), ("zero3", "F32"), of=STORIES))
def test_six_steps_are_three_and_three(case: tuple[str, str]) -> None:
    stage, dtype = case
    found = story(stage, 2, dtype)
    assert found["losses"][6:] == found["losses"][3:6]
    _, whole, again = found["states"]
    assert whole.keys() == again.keys()
    assert {name for name in whole if not np.array_equal(whole[name], again[name])} == set()


@pytest.mark.parametrize("stage", sample("zero2"))
def test_bfloat16_without_clipping_is_ddp_bit_for_bit(stage: str) -> None:
    """Nothing is rounded elsewhere; with a microbatch for each of two ranks no sum has another order."""
    found, wanted = story(stage, 2, "BF16", 0.0, 2), story("", 2, "BF16", 0.0, 2)
    assert found["losses"] == wanted["losses"]
    for ours, theirs in zip(found["states"], wanted["states"], strict=True):
        assert ours.keys() == theirs.keys()
        assert {name for name in theirs if not np.array_equal(ours[name], theirs[name])} == set()


@pytest.mark.whole
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_is_that_of_copies(stage: str) -> None:
    """The norm's last digits, by which gradients are clipped, round a bf16 weight the other way now and then."""
    found, wanted = story(stage, 2, "BF16"), story("", 2, "BF16")
    assert found["losses"][:2] == pytest.approx(wanted["losses"][:2], rel=1e-5)
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-3)


def held(given: Any) -> tuple[Any, int, int]:
    """Of one rank after a step: what the engine says of what is trained, bytes of masters and moments, of weights."""
    start_of, stage, world_size = given
    dims, device = join(world_size)
    from mswift.parallel.batch import Microbatch
    from tests.support.engines import make_engine

    reader = MemoryReader(*start_of)
    settings = ADAM | {"optimizer": "adam", "backend": "deepspeed", "deepspeed": stage}
    engine = make_engine(reader.table, dims, settings, device)
    engine.load_weights(reader)
    (step,) = random_steps(1, batch=1, length=12)
    engine.train_step([Microbatch(*step[engine.coordinate.dp])], 1e-3)
    says, rule = engine.held_bytes()[1], engine._zero._rule
    kept = sum(flat.nbytes + sum(t.nbytes for t in state.values() if t.dim()) for flat, state in rule.state.items())
    parameters = engine._weights.parameters.values()
    weights = sum((p.ds_tensor if "zero3" in stage else p).untyped_storage().nbytes() for p in parameters)
    engine.close()
    return says, kept, weights


@pytest.mark.parametrize("stage", sample("zero1", "zero3"))
def test_a_rank_holds_its_share(stage: str) -> None:
    """A few elements fill up a rank's share."""
    whole = sum(array.nbytes for array in start(MODEL)[1].values())
    for size in (1, 2):
        for says, kept, weights in run_ranks(size, held, (start(MODEL), stage, size)):
            assert kept == says.optimizer == pytest.approx(3 * whole / size, rel=1e-3)
            assert says.gradients == pytest.approx(whole / (1 if stage == "zero1" else size), rel=1e-3)
            assert says.weights == pytest.approx(whole / (size if "zero3" in stage else 1), rel=1e-3)
            assert weights >= says.weights


MOVES = [("zero3", 2, "zero1", 1), ("zero2", 1, "zero2", 2), ("zero2", 2, "zero2", 1), ("zero1", 2, "zero3", 2)]
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"backend": "fsdp", "shard_size": 1},
    "fsdp": {"backend": "fsdp", "shard_size": 2},
    "megatron": {},
}


@pytest.mark.parametrize("move", sample(*MOVES[:2], of=MOVES))
def test_state_goes_on_at_another_number_of_ranks(move: tuple[str, int, str, int]) -> None:
    stage, ranks, then, other = move
    first = story(stage, ranks)
    settings = ADAM | {"optimizer": "adam", "backend": "deepspeed", "deepspeed": then, "dtype": "F32"}
    (found, *_) = run_ranks(other, on_rank, (start(MODEL), settings, other, first["states"][0], 4))
    assert found["losses"] == pytest.approx(first["losses"][3:6], rel=1e-6)


CROSSINGS = [(stage, engine) for stage in ("zero2", "zero3") for engine in ENGINES]


@pytest.mark.parametrize("crossing", sample(("zero2", "megatron"), of=CROSSINGS))
def test_state_goes_to_another_engine_and_back(crossing: tuple[str, str]) -> None:
    stage, engine = crossing
    first = story(stage, 2)
    settings = ADAM | {"optimizer": "adam", "dtype": "F32"}
    ranks = run_ranks(2, on_rank, (start(MODEL), settings | ENGINES[engine], 2, first["states"][0], 4))
    assert ranks[0]["losses"] == pytest.approx(first["losses"][3:6], rel=1e-6)
    theirs, ours = assemble([rank["states"][0] for rank in ranks]), first["states"][1]
    assert theirs.keys() == ours.keys()
    moments = [name for name in ours if ".exp_avg_sq." in name]
    assert max(difference(theirs[name], ours[name]) for name in moments) < 1e-4
    own = settings | {"backend": "deepspeed", "deepspeed": stage}
    back, *_ = run_ranks(2, on_rank, (start(MODEL), own, 2, theirs, 4))
    again, *_ = run_ranks(2, on_rank, (start(MODEL), own, 2, ours, 4))
    assert back["losses"] == pytest.approx(again["losses"], rel=1e-5)


def sent(given: Any) -> int:
    """Bytes that this rank gives to sums over ranks in a step of so many microbatches; numbers of steps left out."""
    start_of, stage, num_microbatches = given
    dims, device = join(2)
    from mswift.parallel.batch import Microbatch
    from mswift.parallel.traffic_counter import TrafficCounter
    from tests.support.engines import make_engine

    reader = MemoryReader(*start_of)
    settings = ADAM | {"optimizer": "adam", "backend": "deepspeed", "deepspeed": stage}
    engine = make_engine(reader.table, dims, settings, device)
    engine.load_weights(reader)
    (step,) = random_steps(1, num_microbatches=2 * num_microbatches)
    with TrafficCounter({}) as traffic:
        engine.train_step([Microbatch(*batch) for batch in step[engine.coordinate.dp :: 2]], 1e-3)
    engine.close()
    return sum(each.num_bytes for each in traffic.found if each.kind == "all_reduce")


def test_zero1_sums_gradients_once_a_step() -> None:
    parameters = sum(array.nbytes for array in start(MODEL)[1].values())
    few, many = (run_ranks(2, sent, (start(MODEL), "zero1", number))[0] for number in (1, 4))
    assert parameters <= few == many < 1.01 * parameters + 10_000


@pytest.mark.whole
def test_zero2_sums_its_share_in_each_microbatch() -> None:
    parameters = sum(array.nbytes for array in start(MODEL)[1].values())
    few, many = (run_ranks(2, sent, (start(MODEL), "zero2", number))[0] for number in (1, 4))
    assert many - few == pytest.approx(3 * parameters, rel=0.01)


# -- faults


@pytest.mark.parametrize("stage", sample("zero3"))
def test_an_update_that_is_not_finite_is_left_out(stage: str) -> None:
    for rank in run_ranks(2, poisoned, (start(MODEL), stage, 2)):
        assert rank["updated"] == [False, True]
        assert not np.isfinite(rank["grad_norm"])
        assert rank["unchanged"]
        assert rank["step"] == 1
        assert rank["loss"] == rank["wanted"]


def poisoned(given: Any) -> dict[str, Any]:
    """One rank: a batch with a loss weight of nan on one rank alone, then a good one; and the good one alone."""
    start_of, stage, world_size = given
    dims, device = join(world_size)
    import torch

    from mswift.parallel.batch import Microbatch
    from tests.support.engines import make_engine

    reader = MemoryReader(*start_of)
    settings = ADAM | {"optimizer": "adam", "backend": "deepspeed", "deepspeed": stage}
    (good,) = random_steps(1)
    mine = [good[torch.distributed.get_rank()]]
    tokens, labels, weights = mine[0]
    bad = weights.clone()
    bad[0, 3] = float("nan") if torch.distributed.get_rank() == world_size - 1 else weights[0, 3]
    found: dict[str, Any] = {"updated": []}
    for with_bad in (True, False):
        engine = make_engine(reader.table, dims, settings, device)
        engine.load_weights(reader)
        if with_bad:
            before = gather(engine.model_shards())
            result = engine.train_step([Microbatch(tokens, labels, bad)], 1e-3)
            after = gather(engine.model_shards())
            found["updated"].append(result.updated)
            found["grad_norm"] = result.grad_norm
            found["unchanged"] = _same(before, after)
        result = engine.train_step([Microbatch(*mine[0])], 1e-3)
        loss = engine.evaluate([Microbatch(*mine[0])])[0].mean
        if with_bad:
            found["updated"].append(result.updated)
            found |= {"loss": loss, "step": engine.optimizer_step}
        else:
            found["wanted"] = loss
        engine.close()
    return found


def _same(before: Any, after: Any) -> bool:
    """Whether what a rank gathered is the same, element by element."""
    pairs = [(a, b) for key in before for a, b in zip(before[key][1], after[key][1], strict=True)]
    return bool(pairs) and all(bool((a[1] == b[1]).all()) for a, b in pairs)
