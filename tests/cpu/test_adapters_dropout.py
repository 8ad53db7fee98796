"""Dropout of adapters: the same elements at any layout, and with them what PEFT computes.

PEFT's dropout modules are given the masks; everything else is PEFT's. Three steps, fp32, 1e-5 against PEFT and 5e-6
against one rank. Of packed rows PEFT computes each document by itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from mswift.parallel.dropout import BatchPlace, at, dropped, keep
from tests.support.adapters import edit_config, load_peft, random_adapter
from tests.support.lora_parity import mswift_run, peft_steps
from tests.support.parity import differences, random_model, random_steps
from tests.support.ranks import run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"cp": 2}),
}
ALL = ("logits", "loss", "grad_norm", "gradients", "weights", "momentum_buffer")
TOLERANCE, OF_LAYOUTS = 1e-5, 5e-6
SEED, PROBABILITY = 42, 0.3


class Masked(torch.nn.Module):
    """In place of a dropout of PEFT's: x [b, s, i] with our mask, at the place that `Counted` says."""

    def __init__(self, name: str, counted: "Counted") -> None:
        super().__init__()
        self.name, self.counted = name, [counted]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = self.counted[0].place()
        if place is None:
            return x
        step, rows, first = place
        tokens, features = torch.arange(first, first + x.shape[1]), torch.arange(x.shape[2])
        kept = keep(f"{SEED}:{step}:{self.name}", rows, tokens, features, PROBABILITY).transpose(0, 1)
        return x * kept / (1 - PROBABILITY)


class Counted:
    """Counts the forward passes of a model: one for logits, then the parts of each step."""

    def __init__(self, parts: list[tuple[torch.Tensor, int]]) -> None:
        """parts: rows of the global batch of every pass of a step, and the place in them where it begins."""
        self.passes, self.parts = -2, parts

    def count(self, *_: Any) -> None:
        self.passes += 1

    def place(self) -> tuple[int, torch.Tensor, int] | None:
        if self.passes < 0:
            return None
        step, number = divmod(self.passes, len(self.parts))
        return step, *self.parts[number]


def by_peft(home: Path, counted: Counted, steps: Any = None) -> dict[str, Any]:
    """Three steps of PEFT, whose dropouts have our masks."""
    random_model("qwen2").save_pretrained(home / "model")  # type: ignore[operator]
    adapter = random_adapter(home / "adapter", home / "model")
    edit_config(adapter, lora_dropout=PROBABILITY)
    peft = load_peft(home / "model", adapter, trainable=True)
    peft.register_forward_pre_hook(counted.count)
    for name, module in peft.named_modules():
        if hasattr(module, "lora_dropout"):
            assert module.lora_dropout["default"].p == PROBABILITY
            module.lora_dropout["default"] = Masked(name.removeprefix("base_model.model."), counted)
    return peft_steps(home, peft, steps=steps)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    batch, num_microbatches = len(random_steps()[0][0][0]), len(random_steps()[0])
    rows = [torch.arange(number * batch, (number + 1) * batch) for number in range(num_microbatches)]
    return by_peft(tmp_path_factory.mktemp("dropout"), Counted([(each, 0) for each in rows]))


@pytest.fixture(scope="module")
def one(truth: dict[str, Any]) -> dict[str, Any]:
    return mswift_run(truth["home"], *LAYOUTS["one"])


def test_three_steps_equal_peft(truth: dict[str, Any], one: dict[str, Any]) -> None:
    assert {n: d for n, d in differences(one, truth, ALL).items() if not d <= TOLERANCE} == {}


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2", "dp2"])
def test_every_layout_drops_the_same_elements(truth: dict[str, Any], one: dict[str, Any], layout: str) -> None:
    found = mswift_run(truth["home"], *LAYOUTS[layout])
    assert {n: d for n, d in differences(found, one, ALL).items() if not d <= OF_LAYOUTS} == {}


FSDP: dict[str, Any] = {"backend": "fsdp", "shard_size": 2}


@pytest.mark.parametrize("degrees", [{}, {"cp": 2}])
def test_transformers_model_drops_the_same_elements(truth: dict[str, Any], degrees: dict[str, Any]) -> None:
    found = mswift_run(truth["home"], 2, degrees, settings=FSDP | {"recompute_blocks": 2 if degrees else 0})
    assert {n: d for n, d in differences(found, truth, ALL).items() if not d <= TOLERANCE} == {}


DOCUMENTS = (7, 1, 16)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What PEFT computes of the same rows, cut into documents."""
    edges = list(pairwise([0, *accumulate(DOCUMENTS)]))
    steps = [
        [tuple(x[row : row + 1, a:b] for x in batch) for batch in step for row in range(2) for a, b in edges]
        for step in random_steps()
    ]
    places = [(torch.tensor([row]), first) for row in range(4) for first, _ in edges]
    return by_peft(tmp_path_factory.mktemp("packed-dropout"), Counted(places), steps)


@pytest.mark.parametrize("layout", ["tp2-sp", "dp2", "cp2"])
def test_packed_documents_equal_peft_on_each_by_itself(apart: dict[str, Any], layout: str) -> None:
    """Dropped are the elements of their rows and places, however a rank pads the documents."""
    found = mswift_run(apart["home"], *LAYOUTS[layout], documents=DOCUMENTS)
    assert {n: d for n, d in differences(found, apart, ALL[1:]).items() if not d <= TOLERANCE} == {}


@contextmanager
def tokens_counted_from_this_rank() -> Iterator[None]:
    """Under sequence parallelism every rank drops what the first one does."""
    from mswift.parallel import fused_lora

    with patch.object(fused_lora, "dropped", lambda *a, first_token, **k: dropped(*a, first_token=0, **k)):
        yield


@contextmanager
def features_counted_from_this_rank() -> Iterator[None]:
    """Before a row-parallel base."""
    from mswift.parallel import fused_lora

    with patch.object(fused_lora, "dropped", lambda *a, first_feature, **k: dropped(*a, first_feature=0, **k)):
        yield


@contextmanager
def rows_counted_from_this_rank() -> Iterator[None]:
    """Data-parallel ranks drop alike."""
    from mswift.parallel import dropout

    def place(seed: int, step: int, rows: torch.Tensor, *others: torch.Tensor | None) -> BatchPlace:
        return BatchPlace(seed, step, torch.arange(len(rows)), *others)

    with patch.object(dropout, "BatchPlace", place):
        yield


@contextmanager
def positions_counted_from_this_rank() -> Iterator[None]:
    """Context-parallel ranks drop alike."""
    from mswift.parallel import dropout

    def place(seed: int, step: int, rows: torch.Tensor, *others: torch.Tensor | None) -> BatchPlace:
        return BatchPlace(seed, step, rows)

    with patch.object(dropout, "BatchPlace", place):
        yield


@pytest.mark.parametrize(
    ("broken", "layout"),
    [
        ("tokens_counted_from_this_rank", "tp2-sp"),
        ("features_counted_from_this_rank", "tp2"),
        ("rows_counted_from_this_rank", "dp2"),
        ("positions_counted_from_this_rank", "cp2"),
    ],
)
def test_another_mask_is_seen(truth: dict[str, Any], one: dict[str, Any], broken: str, layout: str) -> None:
    found = mswift_run(truth["home"], *LAYOUTS[layout], broken=f"tests/cpu/test_adapters_dropout.py:{broken}")
    assert max(differences(found, one, ("gradients",)).values()) > 1e-3


ROWS, TOKENS, FEATURES = torch.arange(3), torch.arange(257), torch.arange(511)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_masks_are_even_and_independent(probability: float) -> None:
    """Rates over every axis, pairs of neighbours and of names, within five standard deviations."""
    mask = keep("key", ROWS, TOKENS, FEATURES, probability)
    other = keep("kez", ROWS, TOKENS, FEATURES, probability)
    rate = 1 - probability
    for axes in ((0, 1, 2), (0, 1), (1, 2), (0, 2)):
        kept = mask.double().mean(dim=axes)
        count = mask.numel() / kept.numel()
        assert ((kept - rate).abs() < 5.5 * (rate * probability / count) ** 0.5).all()
    pairs = (mask, other), (mask[:-1], mask[1:]), (mask[:, :-1], mask[:, 1:]), (mask[..., :-1], mask[..., 1:])
    for left, right in pairs:
        both = (left & right).double().mean()
        assert abs(both - rate**2) < 5.5 * (rate**2 * (1 - rate**2) / left.numel()) ** 0.5


def test_masks_are_pinned() -> None:
    """The same on every machine and version; a part of a mask is the mask of the part."""
    mask = keep("42:0:model.layers.0.self_attn.q_proj", ROWS, TOKENS, FEATURES, 0.5)
    part = keep("42:0:model.layers.0.self_attn.q_proj", ROWS[1:], TOKENS[5:], FEATURES[7:], 0.5)
    assert torch.equal(part, mask[5:, 1:, 7:])
    assert mask[0, 0, :16].int().tolist() == PINNED


PINNED = [1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1]


def compute_twice(_payload: Any) -> dict[str, Any]:
    """A layer through megatron-core's recomputation, at one microbatch forward and after another one backward."""
    from tests.support.ranks import join

    join(1)
    from megatron.core import tensor_parallel

    weight = torch.ones(4, 2, 8, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return dropped(x * weight, "name", 0.5, first_token=0, first_feature=0)

    with at(BatchPlace(1, 0, torch.arange(2))):
        plain = layer(torch.ones_like(weight)).detach()
        out = tensor_parallel.checkpoint(layer, False, torch.ones(4, 2, 8, requires_grad=True))
    with at(BatchPlace(1, 0, torch.arange(2, 4))):
        other = layer(torch.ones_like(weight)).detach()
    out.sum().backward()
    outside = ""
    try:
        layer(weight)
    except RuntimeError as error:
        outside = str(error)
    with torch.no_grad():
        evaluated = layer(torch.ones_like(weight))
    return {
        "plain": plain,
        "out": out.detach(),
        "grad": weight.grad,
        "other": other,
        "evaluated": evaluated,
        "outside": outside,
    }


def test_a_layer_computed_again_drops_the_same() -> None:
    (found,) = run_ranks(1, compute_twice)
    assert torch.equal(found["out"], found["plain"])
    assert torch.equal(found["grad"], found["plain"])
    assert not torch.equal(found["other"], found["plain"])
    assert torch.equal(found["evaluated"], torch.ones(4, 2, 8))
    assert "which microbatch is this" in found["outside"]


def test_an_adapter_to_continue_keeps_its_dropout(tmp_path: Path) -> None:
    from mswift.tuners.adapter import PeftAdapter
    from tests.support.adapters import table_of

    random_model("qwen2", num_hidden_layers=1).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    adapter = random_adapter(tmp_path / "adapter", tmp_path / "model")
    edit_config(adapter, lora_dropout=0.1)
    lora, _ = PeftAdapter(adapter).lora_config(table_of(tmp_path / "model"), 0)
    assert lora.settings.dropout == 0.1
