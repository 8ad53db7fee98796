"""LoRA on a base that keeps the codes of GPTQ and AWQ is LoRA on the dequantised base, bit for bit, at any layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.adapters import load_peft, random_adapter
from tests.support.lora_parity import mswift_run, peft_steps
from tests.support.parity import BASE, differences, model_of
from tests.support.quantised import AWQ, GPTQ, quantise_directory

GROUP = 32
MODEL = BASE | {
    "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8,
    "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
KINDS = {"gptq": GPTQ | {"group_size": GROUP}, "awq": AWQ | {"group_size": GROUP}}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "tp2": (2, {"tp": 2, "sequence_parallel": True}, {}),
    "pp2": (2, {"pp": 2}, {}),
    "ddp": (2, {}, {"backend": "fsdp", "recompute_blocks": 1}),
    "fsdp": (2, {}, {"backend": "fsdp", "shard_size": 2}),
}
PACKED = MODEL["num_hidden_layers"] * 3 * (128 * 128 + 256 * 128)
BYTES = 0.5 + 3 / GROUP
"""Of a weight: its code, an F16 scale and a zero for each group."""


@pytest.fixture(scope="module", params=KINDS)
def home(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    model_of(MODEL).save_pretrained(path / "base")  # type: ignore[operator]
    quantise_directory(path / "base", KINDS[request.param], path / "model")
    random_adapter(path / "adapter", path / "model-plain", ("all-linear",))
    return path


def different(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of what is not the same in every bit."""
    parts = ("gradients", "weights", "momentum_buffer")
    names = [f"{part} {name}" for part in parts for name in wanted[part]
             if not np.array_equal(found[part][name], wanted[part][name])]  # fmt: skip
    names += [name for name in ("loss", "grad_norm") if found[name] != wanted[name]]
    return names + ["logits"] * (not np.array_equal(found["logits"], wanted["logits"]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_three_steps_are_those_of_the_dequantised_base(home: Path, layout: str, dtype: str) -> None:
    world_size, dims, settings = LAYOUTS[layout]
    held = mswift_run(home, world_size, dims, dtype=dtype, settings=settings | {"four_bit_base": "codes"})
    whole = mswift_run(home, world_size, dims, dtype=dtype, settings=settings)
    assert different(held, whole) == []
    frozen, plain = ([rank["held"][0] for rank in run["ranks"]] for run in (held, whole))
    share = 2 if layout in ("tp2", "pp2", "fsdp") else 1
    item = 4 if dtype == "F32" else 2
    for mine, theirs in zip(frozen, plain, strict=True):
        assert theirs.weights - mine.weights == PACKED / share * (item - BYTES)


def test_three_steps_equal_peft(home: Path) -> None:
    wanted = peft_steps(home, load_peft(home / "model-plain", home / "adapter", trainable=True))
    found = mswift_run(home, 1, {}, settings={"four_bit_base": "codes"})
    parts = ("logits", "loss", "grad_norm", "gradients", "weights", "momentum_buffer")
    assert {n: d for n, d in differences(found, wanted, parts).items() if not d <= 1e-5} == {}
