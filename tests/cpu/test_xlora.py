"""X-LoRA against PEFT on transformers in one process: counts, loss, gradients, weights, files.

fp32; at most 1e-5 from PEFT (max|a - b| / max|b| per tensor): one rank, cut over two with recomputation, packed, packed
on two ranks that share sequences.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mswift.parallel.fsdp.config import FsdpConfig
from mswift.parallel.fsdp.tuned import tuned_model
from mswift.tuners.export import export_adapter
from tests.support.adapters import table_of
from tests.support.parity import VOCAB, difference, differences, random_model
from tests.support.prompts import DOCUMENTS, steps_of
from tests.support.ranks import run_ranks
from tests.support.xlora import (
    CASES,
    continued_on_rank,
    engine_steps,
    load_xlora,
    make_loras,
    mixed_of,
    peft_steps,
)

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], tuple[int, ...] | None]] = {
    "one": (1, {}, {}, None),
    "cut over two": (2, {}, {"shard_size": 2, "recompute_blocks": 2}, None),
    "packed": (1, {}, {}, DOCUMENTS),
    "packed, shared": (
        2, {"cp": 2}, {"shard_size": 2, "recompute_blocks": 1, "recompute_keeps_products": True}, DOCUMENTS,
    ),
}  # fmt: skip
WHAT = ("logits", "loss", "grad_norm", "gradients", "weights", "last")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xlora")
    model: Any = random_model("qwen3", num_hidden_layers=2, vocab_size=VOCAB)
    model.save_pretrained(folder / "model")
    make_loras(model, folder)
    return folder


@pytest.fixture(scope="module")
def wanted(home: Path) -> Any:
    """(case, packed) -> what PEFT computes."""
    return cache(lambda case, packed: peft_steps(home, mixed_of(home, CASES[case]), DOCUMENTS if packed else None))


@pytest.fixture(scope="module")
def found(home: Path) -> Any:
    """Layout -> case -> what the engine computes."""

    @cache
    def results(layout: str) -> dict[str, Any]:
        world_size, dims, settings, documents = LAYOUTS[layout]
        run = home / "runs" if layout == "cut over two" else None
        configs = [mixed_of(home, fields) for fields in CASES.values()]
        computed = engine_steps(home, configs, world_size, dims, settings, documents=documents, run=run)
        return dict(zip(CASES, computed, strict=True))

    return results


SAMPLED = [pytest.param(name, marks=pytest.mark.whole) if name in ("one", "packed") else name for name in LAYOUTS]


@pytest.mark.parametrize("layout", SAMPLED)
@pytest.mark.parametrize("case", CASES)
def test_equals_peft(wanted: Any, found: Any, case: str, layout: str) -> None:
    theirs, ours = wanted(case, LAYOUTS[layout][3] is not None), dict(found(layout)[case])
    ours["weights"] = {name: ours["weights"][name] for name in theirs["weights"]}
    assert ours["trainable"] == theirs["trainable"]
    apart = differences(ours, theirs, WHAT)
    assert {name: value for name, value in apart.items() if not value <= 1e-5} == {}
    assert difference(theirs["last"], theirs["logits"]) > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_nothing_else_has_a_gradient(home: Path, case: str) -> None:
    tuned = tuned_model(table_of(home / "model"), FsdpConfig(method=mixed_of(home, CASES[case])), torch.device("cpu"))
    learning = {name for name, parameter in tuned.parameters().items() if parameter.requires_grad}
    assert learning == tuned.trained.keys() != set()


@pytest.mark.whole
@pytest.mark.parametrize("name", ["gemma2", "starcoder2", "llama-tied"])
def test_other_models(tmp_path: Path, name: str) -> None:
    model: Any = random_model(name, num_hidden_layers=2, vocab_size=VOCAB)
    model.save_pretrained(tmp_path / "model")
    make_loras(model, tmp_path, leaves={"up_proj": "c_fc", "down_proj": "c_proj"} if name == "starcoder2" else {})
    config = mixed_of(tmp_path, CASES["deep"])
    (ours,) = engine_steps(tmp_path, [config], 1)
    apart = differences(ours, peft_steps(tmp_path, config), ("logits", "loss", "grad_norm", "last"))
    assert {what: value for what, value in apart.items() if not value <= 1e-5} == {}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_same_run(found: Any, case: str) -> None:
    for weights, state, resumed in found("cut over two")[case]["each"]:
        for ours, theirs in ((weights, resumed["weights"]), (state, resumed["state"])):
            assert ours.keys() == theirs.keys()
            for key, (_, boxes) in ours.items():
                pairs = zip(boxes, theirs[key][1], strict=True)
                assert all(np.array_equal(one[-1], other[-1]) for one, other in pairs), key


@pytest.fixture(scope="module")
def exported(home: Path, found: Any) -> Any:
    """Case -> the directory of the last checkpoint."""

    @cache
    def directory(case: str) -> Path:
        found("cut over two")
        export_adapter(home / "runs" / str(list(CASES).index(case)) / "checkpoint-3", home / "exported" / case)
        return home / "exported" / case

    return directory


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_is_exported(home: Path, found: Any, exported: Any, case: str) -> None:
    with torch.no_grad():
        logits = load_xlora(home, exported(case))(steps_of()[0][0][0]).logits.numpy()
    assert difference(logits, found("cut over two")[case]["last"]) <= 1e-5


def test_another_number_of_ranks_goes_on_and_a_moved_directory_is_continued(
    home: Path, wanted: Any, found: Any, exported: Any, tmp_path: Path
) -> None:
    """From the checkpoint after two updates, one rank; from the directory, whose LoRAs lie elsewhere by now."""
    result, case = found("cut over two"), "trained"
    shutil.copytree(exported(case), tmp_path / "moved")
    content = json.loads((tmp_path / "moved" / "adapter_config.json").read_text())
    content["adapters"] = {number: f"/nowhere/{number}" for number in content["adapters"]}
    (tmp_path / "moved" / "adapter_config.json").write_text(json.dumps(content))
    run = home / "runs" / str(list(CASES).index(case))
    payload = {"home": home, "config": mixed_of(home, CASES[case]), "saved": run / "checkpoint-2"}
    (ours,) = run_ranks(1, continued_on_rank, payload | {"directory": tmp_path / "moved"})
    theirs = wanted(case, False)
    apart = differences(ours, {"loss": theirs["loss"][2], "last": theirs["last"]}, ("loss", "last"))
    assert {what: value for what, value in apart.items() if not value <= 1e-5} == {}
    assert difference(ours["of directory"], result[case]["last"]) <= 1e-5


def test_dropout_is_the_same_at_any_layout(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "model", tmp_path / "model")
    make_loras(random_model("qwen3", num_hidden_layers=2, vocab_size=VOCAB), tmp_path, dropout=0.3)
    config = mixed_of(tmp_path, CASES["deep"] | {"xlora_dropout_p": 0.3})
    settings = {"shard_size": 2, "recompute_blocks": 2}
    (one,) = engine_steps(tmp_path, [config], 1)
    (cut,) = engine_steps(tmp_path, [config], 2, {}, settings)
    (shared,) = engine_steps(tmp_path, [config], 2, {"cp": 2}, settings)
    for other in (cut, shared):
        apart = differences(other, one, ("loss", "gradients", "weights"))
        assert {name: value for name, value in apart.items() if not value <= 1e-5} == {}
    total, weight = one["evaluated"]
    assert abs(one["loss"][0] - total / weight) > 1e-3
