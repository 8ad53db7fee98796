"""LoRA on Megatron at any layout computes what PEFT computes on the transformers model with the same adapter.

fp32; logits, loss, gradient norm, every gradient and, after three steps of SGD with momentum, every adapter weight at
most 1e-5 apart (max|a - b| / max|b| per tensor).
"""

from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mswift.tuners.export import export_adapter
from mswift.tuners.merge import merge
from tests.support.adapters import difference, hashes, load_peft
from tests.support.lora_parity import bitwise_equal, mswift_run, peft_run
from tests.support.parity import differences, random_steps

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
    "tp2-sp-pp2": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    "tp2-dp2": (4, {"tp": 2}),
}
MODELS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "every linear": ("qwen3", ("all-linear",), ()),
    "some linears, biases, tied and trained embedding": ("qwen2", ("q_proj", "v_proj", "up_proj"), ("embed_tokens",)),
    "some linears, all biases, trained head": (
        "llama-biases",
        ("k_proj", "o_proj", "gate_proj", "down_proj"),
        ("lm_head",),
    ),
    "tied and frozen embedding": ("qwen3-tied", ("all-linear",), ()),
    "linears that HF fuses": ("phi3", ("all-linear",), ()),
    "some linears that HF fuses": ("phi3", ("qkv_proj", "down_proj"), ()),
    "norms behind the linears": ("gemma2", ("all-linear",), ()),
    "norms over all heads": ("olmo2", ("all-linear",), ()),
    "no gate": ("starcoder2", ("all-linear",), ()),
}
OLDER = tuple(MODELS)[:4]
MERGED = (*OLDER, "linears that HF fuses")
CASES = [
    *(("every linear", layout) for layout in LAYOUTS if layout != "pp2"),
    *(("some linears, biases, tied and trained embedding", layout) for layout in ("tp2", "pp2", "tp2-sp-pp2")),
    *(("some linears, all biases, trained head", layout) for layout in ("tp2-sp", "dp2")),
    ("tied and frozen embedding", "pp2"),
    ("linears that HF fuses", "one"),
    ("some linears that HF fuses", "tp2"),
    *(
        (case, "tp2-sp")
        for case in ("linears that HF fuses", "norms behind the linears", "norms over all heads", "no gate")
    ),
]
ALL = ("logits", "loss", "grad_norm", "gradients", "weights", "momentum_buffer")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Case name -> PEFT's results, computed once."""
    known: dict[str, dict[str, Any]] = {}

    def of(case: str) -> dict[str, Any]:
        if case not in known:
            known[case] = peft_run(tmp_path_factory.mktemp("lora"), *MODELS[case])
        return known[case]

    return of


@pytest.mark.parametrize(("case", "layout"), CASES)
def test_three_steps_equal_peft(truth: Any, case: str, layout: str) -> None:
    expected = truth(case)
    found = mswift_run(expected["home"], *LAYOUTS[layout])
    assert {n: d for n, d in differences(found, expected, ALL).items() if not d <= TOLERANCE} == {}
    assert found["trainable"] == expected["trainable"]
    for rank in found["ranks"]:
        assert rank["base_untouched"]
        assert rank["buffered_frozen"] == 0
        assert rank["num_frozen"] > 0
        assert rank["gradient_elements"] == rank["trained_elements"]
    if "dp2" not in layout:
        assert all(rank["master_elements"] == rank["trained_elements"] for rank in found["ranks"])
        for stage in {rank["coordinate"].pp for rank in found["ranks"]}:
            same = [rank["replicated"] for rank in found["ranks"] if rank["coordinate"].pp == stage]
            assert bitwise_equal(same), "tensor-parallel ranks disagree on a replicated gradient"


@pytest.mark.parametrize("layout", ["tp2", "tp2-pp2"])
def test_the_start_does_not_depend_on_the_layout(truth: Any, layout: str) -> None:
    """A within PEFT's bound 1/sqrt(in), spread over it, the same bits at any layout; B zero."""
    home = truth("every linear")["home"]
    one, other = (mswift_run(home, *LAYOUTS[name], fresh=True)["weights"] for name in ("one", layout))
    assert bitwise_equal([one, other])
    for name, values in one.items():
        if "lora_B" in name:
            assert not values.any()
        else:
            bound = 1 / sqrt(values.shape[1])
            assert 0.9 * bound < np.abs(values).max() <= bound
    assert len({values.tobytes() for name, values in one.items() if "lora_A" in name}) == len(one) // 2


@pytest.mark.parametrize(("case", "dtype"), [(c, "F32") for c in MERGED] + [("every linear", "BF16")])
def test_exported_and_merged_adapters_are_the_trained_model(truth: Any, tmp_path: Path, case: str, dtype: str) -> None:
    """Trained and saved five times at TP2 x PP2: PEFT and the merged model give Megatron's logits; base untouched."""
    home = truth(case)["home"]
    before = hashes(home)
    found = mswift_run(home, *LAYOUTS["tp2-pp2"], run=tmp_path / "run", dtype=dtype)
    export_adapter(tmp_path / "run" / "checkpoint-5", tmp_path / "adapter")
    merge(home / "model", [tmp_path / "adapter"], tmp_path / "merged")
    assert hashes(home) == before
    assert all(rank["base_untouched"] for rank in found["ranks"])
    tokens, ours = random_steps()[0][0][0], torch.from_numpy(found["trained_logits"])
    with torch.no_grad():
        model = load_peft(home / "model", tmp_path / "adapter")
        peft = model(tokens).logits
        narrow = model.to(torch.bfloat16)(tokens).logits.float()  # as far from fp32 as the engine may be, which has it
        tolerance = TOLERANCE if dtype == "F32" else 1.5 * difference(peft, narrow)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")(tokens).logits
    assert difference(peft, ours) <= tolerance
    assert difference(merged, ours) <= tolerance
    assert difference(peft, torch.from_numpy(found["logits"])) > 0.1, "training changed nothing"
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32 if dtype == "F32" else torch.bfloat16}


def test_bfloat16_trains_bfloat16_adapters_with_fp32_masters(truth: Any) -> None:
    expected = truth("every linear")
    found = mswift_run(expected["home"], *LAYOUTS["tp2-sp"], dtype="BF16")
    assert found["dtypes"] == {"torch.bfloat16"}
    assert found["ranks"][0]["master_dtypes"] == {"torch.float32"}
    frozen, trained = map(str, found["ranks"][0]["held"])
    assert frozen == "2 bytes each (2 weights, 0 gradients, 0 optimizer)"
    assert trained == "14 bytes each (2 weights, 4 gradients, 8 optimizer)"  # SGD: a master and a momentum
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
    apart = differences(found, expected, ("weights",))
    assert max(apart.values()) < 0.02


BREAKS = {  # rule left out -> layout, what is right all the same, what shows it
    "A of k for q": ("one", (), "logits"),
    "kv groups": ("one", (), "logits"),
    "sum over ranks": ("tp2", (), "logits"),
    "copy to ranks": ("tp2", ("logits",), "gradients"),
    "sequence marks": ("tp2-sp", ("logits",), "gradients"),
    "cut marks": ("tp2", ("logits",), "grad_norm"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_rule_is_seen(truth: Any, broken: str) -> None:
    layout, right, wrong = BREAKS[broken]
    expected = truth("every linear")
    found = mswift_run(expected["home"], *LAYOUTS[layout], broken=broken)
    assert all(d <= TOLERANCE for d in differences(found, expected, right).values())
    assert max(differences(found, expected, (wrong,)).values()) > 1e-3


def test_an_adapter_for_another_model_is_refused(truth: Any, tmp_path: Path) -> None:
    from tests.support.adapters import random_adapter
    from tests.support.ranks import RankError

    other = truth("some linears, all biases, trained head")["home"]
    (tmp_path / "model").symlink_to(truth("every linear")["home"] / "model")
    random_adapter(tmp_path / "adapter", other / "model")
    with pytest.raises(RankError, match=r"q_proj\.lora_B\.weight has shape \[64, 4\], the model needs \[128, 4\]"):
        mswift_run(tmp_path, *LAYOUTS["one"])
