"""PEFT's methods beside LoRA, against PEFT on transformers in one process: names, counts, loss, gradients, merges.

fp32; at most 1e-5 from PEFT (max|a - b| / max|b| per tensor), on one rank, cut over two with selective recomputation,
and whole on two.
"""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.export import export_adapter
from mswift.tuners.merge import merge
from mswift.tuners.methods import METHODS
from tests.support.adapters import edit_config, table_of
from tests.support.methods import (
    FIELDS,
    NUM_STEPS,
    engine_steps,
    load_method,
    make_home,
    method_of,
    peft_steps,
    random_peft,
    short_steps,
    stored_names,
    tiny,
)
from tests.support.parity import difference, differences

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "cut over two": (2, {"shard_size": 2, "recompute_blocks": 2, "recompute_keeps_products": True}),
    "whole on two": (2, {"shard_size": 1}),
}
WHAT = ("logits", "loss", "grad_norm", "gradients", "weights")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="module")
def wanted(home: Path) -> Any:
    """Method -> what PEFT computes."""
    return cache(lambda name: peft_steps(random_peft(home, method_of(home, name)), short_steps()))


@pytest.fixture(scope="module")
def found(home: Path, wanted: Any) -> Any:
    """Layout -> method -> what the engine computes."""

    @cache
    def results(layout: str) -> dict[str, Any]:
        for name in METHODS:
            wanted(name)  # writes the adapters
        world_size, settings = LAYOUTS[layout]
        run = home / "runs" if layout == "cut over two" else None
        configs = [method_of(home, name) for name in METHODS]
        return dict(zip(METHODS, engine_steps(home, configs, world_size, settings, run), strict=True))

    return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", METHODS)
def test_equals_peft(wanted: Any, found: Any, name: str, layout: str) -> None:
    ours, theirs = found(layout)[name], wanted(name)
    assert ours["trainable"] == theirs["trainable"]
    apart = differences(ours, theirs, WHAT)
    assert {name: value for name, value in apart.items() if not value <= 1e-5} == {}
    moved = max(difference(theirs["weights"][n], ours["weights"][n]) for n in ours["weights"])
    assert moved < 1e-5
    assert theirs["loss"][-1] != theirs["loss"][0]


@pytest.mark.parametrize("name", METHODS)
def test_an_untrained_adapter_leaves_the_model_alone_where_its_paper_says_so(found: Any, name: str) -> None:
    with torch.no_grad():
        base = tiny()(short_steps()[0][0][0]).logits.numpy()
    apart = difference(found("one")[name]["first"], base)
    assert (apart <= 1e-5) == METHODS[name].starts_at_base
    starts = [found(layout)[name]["start"] for layout in LAYOUTS]
    assert all(np.array_equal(starts[0][n], other[n]) for other in starts[1:] for n in starts[0])


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_same_run(found: Any, name: str) -> None:
    from tests.support.lora_parity import bitwise_equal

    result = found("cut over two")[name]
    for one, other in zip(result["all"], result["all_resumed"], strict=True):
        for ours, theirs in zip(one, other, strict=True):
            assert _arrays(ours).keys() == _arrays(theirs).keys()
            assert bitwise_equal([_arrays(ours), _arrays(theirs)])


def _arrays(gathered: Any) -> dict[str, Any]:
    """What `gather` gives, as arrays by name and place."""
    return {f"{key} {n}": box[-1] for key, (_, boxes) in gathered.items() for n, box in enumerate(boxes)}


@pytest.mark.parametrize("name", METHODS)
def test_peft_loads_what_is_exported(home: Path, found: Any, tmp_path: Path, name: str) -> None:
    result = found("cut over two")[name]
    print(export_adapter(home / "runs" / name / f"checkpoint-{NUM_STEPS // 2}", tmp_path / "adapter"))
    peft = load_method(home, tmp_path / "adapter")
    with torch.no_grad():
        logits = peft(short_steps()[0][0][0]).logits.numpy()
    assert difference(logits, result["saved_logits"]) <= 1e-5


def test_adalora_has_taken_ranks_away(found: Any, wanted: Any) -> None:
    for result in (found("cut over two")["adalora"], wanted("adalora")):
        values = np.concatenate([v.ravel() for n, v in result["weights"].items() if n.endswith("lora_E")])
        assert (values != 0).sum() == FIELDS["adalora"]["target_r"] * len(values) / FIELDS["adalora"]["init_r"]


@pytest.mark.parametrize("name", METHODS)
def test_a_merge_is_peft_s(home: Path, wanted: Any, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    wanted(name)
    merge(home / "model", [home / name], tmp_path / "merged")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    theirs = load_method(home, home / name).merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    apart = {n: difference(ours[n].numpy(), theirs[n].numpy()) for n in ours}
    assert {n: value for n, value in apart.items() if not value <= 1e-6} == {}
    base = AutoModelForCausalLM.from_pretrained(home / "model").state_dict()
    assert sum(not torch.equal(base[n], ours[n]) for n in base) >= 5 * 2


def test_merging_two_methods_at_once_is_refused(home: Path, wanted: Any, tmp_path: Path) -> None:
    wanted("ia3"), wanted("oft")
    with pytest.raises(ConfigError, match="merge one, and the next one into the result"):
        merge(home / "model", [home / "ia3", home / "oft"], tmp_path / "merged")


def test_an_adapter_of_another_shape_is_refused_by_name(home: Path, wanted: Any, tmp_path: Path) -> None:
    wanted("hra")
    shutil.copytree(home / "hra", tmp_path / "hra")
    edit_config(tmp_path / "hra", r=6)
    with pytest.raises(CheckpointError, match=r"hra_u has shape \[\d+, 4\], the model needs \[\d+, 6\]"):
        merge(home / "model", [tmp_path / "hra"], tmp_path / "merged")


@pytest.mark.parametrize("name", METHODS)
def test_every_field_is_one_of_peft_s_with_its_default(name: str) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    method = METHODS[name]
    own = {"total_step": 5} if name == "adalora" else {}
    theirs = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.peft_type)](target_modules=["q_proj"], **own)
    ours = {"alpha", "lora_alpha", "total_step", "feedforward_modules"}  # flags of a run and the model decide these
    for field, value in method.fields.items():
        assert field in ours or getattr(theirs, field) == value, field


@pytest.mark.parametrize("name", METHODS)
def test_names_of_a_file_are_peft_s(home: Path, name: str) -> None:
    config = method_of(home, name, targets=("all-linear",))
    shapes = {n: tuple(tensor.shape) for n, tensor in stored_names(_peft(home, config)).items()}
    assert shapes == config.shapes(table_of(home / "model"))


def _peft(home: Path, config: Any) -> Any:
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType
    from transformers import AutoModelForCausalLM

    content = config.content(table_of(home / "model"))
    kind = PeftType(content.pop("peft_type"))
    own = PEFT_TYPE_TO_CONFIG_MAPPING[kind](**content | {"inference_mode": False})
    return get_peft_model(AutoModelForCausalLM.from_pretrained(home / "model"), own)
