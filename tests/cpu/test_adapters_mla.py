"""LoRA on latent attention computes what PEFT computes, at any layout: its down-projections are on every rank."""

from pathlib import Path
from typing import Any

import pytest

from tests.cpu.test_parity_mla import MODELS
from tests.support.lora_parity import mswift_run, peft_run
from tests.support.parity import BASE, differences

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
}
ALL = ("logits", "loss", "grad_norm", "gradients", "weights", "momentum_buffer")
TOLERANCE = 1e-5


ATTENTION = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@pytest.mark.parametrize(
    ("model", "layouts"), [("dense", ("one", "tp2", "tp2-sp")), ("v3", ("one", "tp2-sp")), ("v2-lite", ("tp2-sp",))]
)
def test_three_steps_equal_peft(model: str, layouts: tuple[str, ...], tmp_path: Path) -> None:
    """Attention alone: of a model that may have experts PEFT takes gate_proj, up_proj and down_proj to be theirs."""
    direct = model == "v2-lite"
    targets = ("q_proj", *ATTENTION) if direct else ("q_a_proj", "q_b_proj", *ATTENTION)
    expected = peft_run(tmp_path, BASE | MODELS[model], targets)
    for layout in layouts:
        found = mswift_run(tmp_path, *LAYOUTS[layout])
        assert {n: d for n, d in differences(found, expected, ALL).items() if not d <= TOLERANCE} == {}, layout
        assert found["trainable"] == expected["trainable"]
        assert all(rank["base_untouched"] for rank in found["ranks"])
