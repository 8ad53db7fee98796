"""LoRA on a base in four bits computes what PEFT on transformers and bitsandbytes computes, at any layout.

fp32; logits, loss, gradients, and weights after three steps at most 1e-5 apart (max|a - b| / max|b| per tensor).
"""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from mswift.errors import ConfigError
from mswift.refusals.engine import check_four_bit_base
from tests.support.adapters import load_peft, random_adapter
from tests.support.lora_parity import mswift_run, peft_steps
from tests.support.parity import BASE, differences, model_of
from tests.support.ranks import join, run_ranks

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'mswift[quant]'")

MODEL = BASE | {
    "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8,
    "num_key_value_heads": 4, "tie_word_embeddings": True, "initializer_range": 0.08,
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "cp2": (2, {"cp": 2}),
}
ALL = ("logits", "loss", "grad_norm", "gradients", "weights", "momentum_buffer")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return truth(tmp_path_factory.mktemp("nf4"), "nf4")


def truth(home: Path, kind: str) -> dict[str, Any]:
    """Three steps of PEFT on transformers' model with bitsandbytes' linears."""
    from transformers import BitsAndBytesConfig

    model_of(MODEL).save_pretrained(home / "model")  # type: ignore[operator]
    random_adapter(home / "adapter", home / "model", ("all-linear",))
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=torch.float32,
    )  # type: ignore[no-untyped-call]
    peft = load_peft(home / "model", home / "adapter", trainable=True, quantization_config=how, device_map="cpu")
    linears = [m for m in peft.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "base_layer")]
    assert len(linears) == 7 * MODEL["num_hidden_layers"]
    return peft_steps(home, peft)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps_equal_peft(nf4: dict[str, Any], layout: str) -> None:
    found = mswift_run(nf4["home"], *LAYOUTS[layout], settings={"four_bit_base": "nf4"})
    assert {n: d for n, d in differences(found, nf4, ALL).items() if not d <= TOLERANCE} == {}
    assert all(rank["base_untouched"] for rank in found["ranks"])
    frozen = [rank["held"][0] for rank in found["ranks"]]
    packed = MODEL["num_hidden_layers"] * 3 * (128 * 128 + 256 * 128) * LAYOUTS[layout][1].get("cp", 1)
    other = sum(held.elements for held in frozen) - packed
    assert sum(held.weights for held in frozen) == packed * (0.5 + 4 / 64) + other * 4


@pytest.mark.parametrize(("world_size", "shard_size"), [(1, 1), (2, 1), (2, 2)])
def test_transformers_model_equals_peft(nf4: dict[str, Any], world_size: int, shard_size: int) -> None:
    """Codes whole on each rank, and cut over two."""
    settings = {"backend": "fsdp", "shard_size": shard_size, "four_bit_base": "nf4", "recompute_blocks": 1}
    found = mswift_run(nf4["home"], world_size, {}, settings=settings)
    assert {n: d for n, d in differences(found, nf4, ALL).items() if not d <= TOLERANCE} == {}
    frozen = found["ranks"][0]["held"][0]
    packed = MODEL["num_hidden_layers"] * 3 * (128 * 128 + 256 * 128) // shard_size
    assert frozen.weights == packed * (0.5 + 4 / 64) + (frozen.elements - packed) * 4


def test_rows_that_ranks_do_not_share_evenly_have_the_codes_of_the_whole() -> None:
    """Of 5 rows over four ranks: two, two, one, none."""
    found = run_ranks(4, unpacked)
    assert [rank["count"] for rank in found] == [2, 2, 1, 0]
    assert all(torch.equal(rank["found"], rank["wanted"]) for rank in found)
    assert found[0]["bytes"] == 2 * 128 * (0.5 + 4 / 64)


def unpacked(_: Any) -> dict[str, Any]:
    """On a rank: a weight cut over all, and bitsandbytes' of the whole."""
    join(4)
    import torch.distributed as dist
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from mswift.parallel.four_bit import PackedWeight

    group = dist.group.WORLD
    assert group is not None
    values = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    own = PackedWeight(torch.nn.Parameter(torch.empty(5, 128), requires_grad=False), "nf4", group)
    with own.filled() as mine:
        mine.copy_(values[own.first : own.first + own.count])
    wanted = dequantize_4bit(*quantize_4bit(values, blocksize=64, quant_type="nf4"))
    return {"count": own.count, "bytes": own.nbytes, "found": own.whole(), "wanted": wanted}


def test_fp4_is_another_function(nf4: dict[str, Any], tmp_path: Path) -> None:
    fp4 = truth(tmp_path, "fp4")
    found = mswift_run(fp4["home"], 1, {}, settings={"four_bit_base": "fp4"})
    assert {n: d for n, d in differences(found, fp4, ALL).items() if not d <= TOLERANCE} == {}
    assert max(differences(found, nf4, ("logits",)).values()) > 100 * TOLERANCE


def test_the_whole_base_is_another_function(nf4: dict[str, Any]) -> None:
    found = mswift_run(nf4["home"], 1, {})
    assert max(differences(found, nf4, ("logits",)).values()) > 100 * TOLERANCE


def test_parts_that_are_no_whole_blocks_are_refused(nf4: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"--quant_bits 4: .* has 32 inputs on a rank"):
        mswift_run(nf4["home"], 4, {"tp": 4}, settings={"four_bit_base": "nf4"})


def test_an_adapter_with_magnitudes_is_refused(nf4: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(nf4["home"] / "model")
    random_adapter(tmp_path / "adapter", tmp_path / "model", ("q_proj",), dora=True)
    with pytest.raises(Exception, match="--quant_method bnb with DoRA"):
        mswift_run(tmp_path, 1, {}, settings={"four_bit_base": "nf4"})


def test_a_base_that_is_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match="use --tuner_type lora"):
        check_four_bit_base(lora=False, dora=False)


def test_a_missing_library_is_one_line() -> None:
    from mswift.parallel.four_bit import library

    with patch.dict(sys.modules, {"bitsandbytes": None}), pytest.raises(ConfigError, match=r"mswift\[quant\]"):
        library()
