"""--backend deepspeed trains PEFT's methods, prompts, Houlsby's adapters, LoReFT at every stage of ZeRO; X-LoRA to 2.

Two ranks, fp32: at most 1e-5 from PEFT or the published formulas (max|a - b| / max|b| per tensor), and a resumed run is
the same run bit for bit. bf16, and modules in full beside an adapter: against ddp. "cut" is ZeRO-3 that keeps no
parameter whole, however small.
"""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mswift.converters.plan import table_for
from mswift.tuners.method import MethodConfig
from mswift.tuners.methods import METHODS
from tests.cpu.test_deepspeed import ENGINES, MODEL, on_rank, start
from tests.cpu.test_hidden import CONFIGS, by_hand
from tests.support.methods import (
    FIELDS,
    TARGETS,
    engine_steps,
    make_home,
    method_of,
    peft_steps,
    random_peft,
    short_steps,
    tiny,
)
from tests.support.parity import difference, differences
from tests.support.prompts import CASES, DOCUMENTS, prompt_of
from tests.support.prompts import peft_steps as prompt_steps
from tests.support.ranks import run_ranks
from tests.support.spaces import assemble
from tests.support.xlora import CASES as XLORA
from tests.support.xlora import engine_steps as xlora_engine_steps
from tests.support.xlora import make_loras, mixed_of
from tests.support.xlora import peft_steps as xlora_peft_steps

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'mswift[deepspeed]'"
)

STAGES = ("zero1", "zero2", "zero2_offload", "cut", "zero3_offload")
TRAINED = sorted(METHODS.keys() - {"adalora"})
WHAT = ("logits", "loss", "grad_norm", "gradients", "weights")


def sample(names: Any, *now: tuple[str, str]) -> list[Any]:
    """Every name at every stage; `make test` runs those of `now`, the others are for `make test-whole`."""
    cases = [(stage, name) for stage in STAGES for name in names]
    return [pytest.param(*case, marks=() if case in now else pytest.mark.whole) for case in cases]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cut = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    home = make_home(tmp_path_factory.mktemp("zero"))
    (home / "cut.json").write_text(json.dumps(cut))
    return home


def zero(home: Path, stage: str) -> dict[str, Any]:
    return {"backend": "deepspeed", "deepspeed": str(home / "cut.json") if stage == "cut" else stage}


def worst(found: Mapping[str, Any], wanted: Mapping[str, Any], what: Any = WHAT) -> dict[str, float]:
    """What is further apart than 1e-5."""
    return {name: value for name, value in differences(found, wanted, what).items() if not value <= 1e-5}


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """What `gather` gave, bit for bit."""
    assert one.keys() == other.keys()
    pairs = [(a[-1], b[-1]) for key in one for a, b in zip(one[key][1], other[key][1], strict=True)]
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


@pytest.mark.parametrize(("stage", "name"), sample(TRAINED, ("zero2", "oft"), ("cut", "vera")))
def test_methods_equal_peft(home: Path, tmp_path: Path, stage: str, name: str) -> None:
    config = method_of(home, name)
    wanted = peft_steps(random_peft(home, config), short_steps())
    (found,) = engine_steps(home, [config], 2, zero(home, stage), tmp_path / "run")
    assert found["trainable"] == wanted["trainable"]
    assert worst(found, wanted) == {}
    for ours, resumed in zip(found["all"], found["all_resumed"], strict=True):
        assert all(same(a, b) for a, b in zip(ours, resumed, strict=True))


@pytest.mark.parametrize(("stage", "case"), sample(CASES, ("cut", "prefix projected")))
@pytest.mark.parametrize("sharing", [pytest.param(False, marks=pytest.mark.whole), True])
def test_prompts_equal_peft(home: Path, tmp_path: Path, stage: str, case: str, sharing: bool) -> None:
    """sharing: packed, on two ranks that share sequences."""
    config, documents = prompt_of(home, case), DOCUMENTS if sharing else None
    payload = {"home": home, "world_size": 2, "settings": zero(home, stage), "documents": documents}
    payload |= {"layout": {"cp": 2} if sharing else {}, "configs": [config], "run": tmp_path / "run"}
    ranks = [found for (found,) in run_ranks(2, "tests/support/prompts.py:on_rank", payload)]
    result, wanted = dict(ranks[0]), prompt_steps(home, config, documents)
    for part, prefix in (("gradients", "gradient.adapter."), ("weights", "adapter.")):
        arrays = {name.removeprefix(prefix): a for name, a in assemble([rank[part] for rank in ranks]).items()}
        result[part] = {name: array for name, array in arrays.items() if name in wanted[part]}
    assert result["trainable"] == wanted["trainable"]
    assert worst(result, wanted, (*WHAT, "last")) == {}
    assert all(same(rank[part], rank["resumed"][part]) for rank in ranks for part in ("weights", "state"))


@pytest.mark.parametrize(("stage", "kind"), sample(CONFIGS, ("cut", "reft")))
def test_hidden_tuners_equal_the_formulas(home: Path, stage: str, kind: str) -> None:
    payload = {"kind": kind, "world_size": 2, "settings": zero(home, stage)}
    found, wanted = run_ranks(2, "tests/cpu/test_hidden.py:on_rank", payload), by_hand(kind)
    weights = assemble([rank.pop("weights") for rank in found])
    assert worst(found[0] | {"weights": weights}, wanted, ("logits", "loss", "grad_norm", "weights")) == {}


@pytest.mark.whole
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero2_offload"])
@pytest.mark.parametrize("case", XLORA)
def test_xlora_equals_peft(home: Path, tmp_path: Path, stage: str, case: str) -> None:
    (tmp_path / "model").symlink_to(home / "model")
    make_loras(tiny(), tmp_path)
    config = mixed_of(tmp_path, XLORA[case])
    (found,) = xlora_engine_steps(tmp_path, [config], 2, {}, zero(home, stage), run=tmp_path / "run")
    wanted = xlora_peft_steps(tmp_path, config, None)
    found["weights"] = {name: found["weights"][name] for name in wanted["weights"]}
    assert worst(found, wanted, (*WHAT, "last")) == {}
    for weights, state, resumed in found["each"]:
        assert same(weights, resumed["weights"])
        assert same(state, resumed["state"])


# -- against ddp


def story(own: Mapping[str, Any]) -> dict[str, Any]:
    """Six steps of two microbatches, and the last three again from what was saved (`test_deepspeed.on_rank`)."""
    settings = {"lr": 1e-2, "weight_decay": 0.1, "clip_grad": 0.0, "dtype": "F32", **own}
    ranks = run_ranks(2, on_rank, (start(MODEL), settings, 2, None, 2))
    return {"losses": ranks[0]["losses"], "states": [assemble([rank["states"][n] for rank in ranks]) for n in range(3)]}


def method_config(name: str) -> Any:
    """Of the model of the stories."""
    if name in CONFIGS:
        return CONFIGS[name]
    return MethodConfig.for_table(table_for(start(MODEL)[0]), name, target_modules=TARGETS, fields=FIELDS[name], seed=7)


def unequal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> set[str]:
    assert ours.keys() == theirs.keys()
    return {name for name in theirs if not np.array_equal(ours[name], theirs[name])}


OF_BF16 = sample(("lokr", "ia3", "adapter", "reft"), ("zero2", "lokr"))


@pytest.mark.parametrize(("stage", "name"), OF_BF16)
def test_a_bfloat16_model_is_that_of_ddp(home: Path, stage: str, name: str) -> None:
    """The adapter is fp32. ZeRO-3's hooks give bf16 sums of gradients within the model another order."""
    shared = {"optimizer": "adam", "dtype": "BF16", "method": method_config(name)}
    found = story(shared | zero(home, stage))
    assert found["losses"][6:] == found["losses"][3:6]
    assert unequal(found["states"][1], found["states"][2]) == set()
    wanted = story(shared | ENGINES["ddp"])
    if stage in ("cut", "zero3_offload"):
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-3)
        return
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
    ours, theirs = found["states"][1], wanted["states"][1]
    assert ours.keys() == theirs.keys()
    apart = {name: difference(ours[name], theirs[name]) for name in theirs if name.startswith("optimizer.")}
    assert {name: value for name, value in apart.items() if not value <= 2e-6} == {}


@pytest.mark.parametrize(("stage", "name"), sample(("oft",)))
def test_modules_in_full_beside_an_adapter(home: Path, stage: str, name: str) -> None:
    shared = {"optimizer": "sgd", "method": method_config(name), "trainable_modules": ("embed_tokens", "lm_head")}
    found, wanted = story(shared | zero(home, stage)), story(shared | ENGINES["ddp"])
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert unequal(found["states"][1], found["states"][2]) == set()
    ours, theirs = found["states"][1], wanted["states"][1]
    assert ours.keys() == theirs.keys()
    assert {name for name in theirs if not difference(ours[name], theirs[name]) <= 1e-5} == set()
    assert "adapter.lm_head.weight" in ours
