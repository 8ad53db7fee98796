"""X-LoRA against PEFT on transformers in one process: counts, loss, gradients, weights, files.

fp32; at most 1e-5 from PEFT (max|a - b| / max|b| per tensor): one rank, cut over two with recomputation, packed, packed
on two ranks that share sequences.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.parity import VOCAB, difference, differences, random_model
from tests.support.prompts import DOCUMENTS
from tests.support.ranks import run_ranks
from tests.support.spaces import assemble
from tests.support.xlora import CASES, make_loras, mixed_of, on_rank, peft_steps

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], tuple[int, ...] | None]] = {
    "one": (1, {}, {}, None),
    "cut over two": (2, {}, {"shard_size": 2, "recompute_blocks": 2}, None),
    "packed": (1, {}, {}, DOCUMENTS),
    "packed, shared": (2, {"cp": 2}, {"shard_size": 2}, DOCUMENTS),
}
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
        payload = {
            "home": home, "world_size": world_size, "layout": dims, "settings": settings, "documents": documents,
            "configs": [mixed_of(home, fields) for fields in CASES.values()],
            "run": home / "runs" if layout == "cut over two" else None,
        }  # fmt: skip
        by_case = {}
        for case, one in zip(CASES, zip(*run_ranks(world_size, on_rank, payload), strict=True), strict=True):
            result = dict(one[0])
            for part, prefix in (("gradients", "gradient.adapter."), ("weights", "adapter.")):
                arrays = assemble([rank[part] for rank in one])
                result[part] = {name.removeprefix(prefix): array for name, array in arrays.items()}
            result["each"] = [(rank["weights"], rank["state"], rank.get("resumed")) for rank in one]
            by_case[case] = result
        return by_case

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
