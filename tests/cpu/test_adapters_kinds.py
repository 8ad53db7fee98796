"""Kinds of LoRA on Megatron compute what PEFT computes: rsLoRA, LoRA+, DoRA, dropout, PiSSA, OLoRA.

fp32; logits, loss, gradients, and weights after three steps at most 1e-5 apart (max|a - b| / max|b| per tensor).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mswift.tuners.export import export_adapter
from mswift.tuners.lora import LoraConfig
from tests.cpu.test_parity_mla import MODELS as MLA
from tests.support.adapters import difference, hashes, load_peft, table_of, trained_parameters
from tests.support.lora_parity import bitwise_equal, mswift_run, peft_run, peft_steps
from tests.support.parity import BASE, differences, random_model, random_steps

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
}
EVERY = ("all-linear",)
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"model": "qwen3", "targets": EVERY, "rslora": True},
    "lora+": {"model": "qwen3", "targets": EVERY, "settings": {"lora_b_lr_ratio": 8.0}},
    "dora": {"model": "qwen3", "targets": EVERY, "dora": True},
    "dora, biases": {"model": "llama-biases", "targets": ("k_proj", "o_proj", "gate_proj", "down_proj"), "dora": True},
    "dora, fused by HF": {"model": "phi3", "targets": EVERY, "dora": True, "rslora": True},
    "dora, latent": {"model": BASE | MLA["dense"], "targets": LATENT, "dora": True},
}
CASES = [
    ("rslora", "tp2-sp"),
    ("lora+", "tp2"),
    ("lora+", "dp2"),
    *(("dora", layout) for layout in ("one", "tp2", "tp2-sp", "pp2")),
    ("dora, biases", "tp2"),
    ("dora, fused by HF", "tp2-sp"),
    ("dora, latent", "tp2-sp"),
]
ALL = ("logits", "loss", "grad_norm", "gradients", "weights", "momentum_buffer")
TOLERANCE = 1e-5
OF_LAYOUTS = 5e-6


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kind -> PEFT's results, computed once."""
    known: dict[str, dict[str, Any]] = {}

    def of(kind: str) -> dict[str, Any]:
        if kind not in known:
            known[kind] = peft_run(tmp_path_factory.mktemp("kind"), **KINDS[kind])
        return known[kind]

    return of


def run(home: Path, kind: str, layout: str, **options: Any) -> dict[str, Any]:
    return mswift_run(home, *LAYOUTS[layout], settings=KINDS[kind].get("settings", {}), **options)


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_three_steps_equal_peft(truth: Any, kind: str, layout: str) -> None:
    expected = truth(kind)
    found = run(expected["home"], kind, layout)
    assert {n: d for n, d in differences(found, expected, ALL).items() if not d <= TOLERANCE} == {}
    assert found["trainable"] == expected["trainable"]
    for rank in found["ranks"]:
        assert rank["base_untouched"]
        assert rank["gradient_elements"] == rank["trained_elements"]


def test_ranks_and_layers_of_an_adapter_to_continue(tmp_path: Path) -> None:
    """rank_pattern, alpha_pattern and layers_to_transform: every linear keeps its own rank and scale."""
    from tests.cpu.test_adapters_variants import peft_adapter

    random_model("qwen3").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    patterns = {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {r".*v_proj": 3.5}}
    peft_adapter(tmp_path / "adapter", tmp_path / "model", layers_to_transform=[0, 1, 3], **patterns)
    expected = peft_steps(tmp_path, load_peft(tmp_path / "model", tmp_path / "adapter", trainable=True))
    found = mswift_run(tmp_path, *LAYOUTS["tp2"])
    assert {n: d for n, d in differences(found, expected, ALL).items() if not d <= TOLERANCE} == {}


def test_magnitudes_start_at_the_lengths_of_the_base(truth: Any) -> None:
    """So that DoRA starts as the base, at any layout."""
    expected = truth("dora")
    weights = load_file(expected["home"] / "model" / "model.safetensors")
    for layout in ("one", "tp2"):
        found = run(expected["home"], "dora", layout, fresh=True)["weights"]
        names = [name for name in found if name.endswith("magnitude_vector")]
        assert len(names) == len(found) // 3
        for name in names:
            length = weights[name.replace("lora_magnitude_vector", "weight")].norm(dim=1).numpy()
            np.testing.assert_allclose(found[name], length, rtol=1e-6)


def test_an_exported_dora_is_the_trained_model(truth: Any, tmp_path: Path) -> None:
    home = truth("dora")["home"]
    found = run(home, "dora", "tp2-sp", run=tmp_path / "run")
    resumed = run(home, "dora", "pp2", resume=tmp_path / "run" / "checkpoint-5")
    assert bitwise_equal([resumed["weights"], found["weights"]])
    assert bitwise_equal([resumed["optimizer"], found["optimizer"]])
    export_adapter(tmp_path / "run" / "checkpoint-5", tmp_path / "adapter")
    assert difference(logits(home, tmp_path / "adapter"), torch.from_numpy(found["trained_logits"])) <= TOLERANCE


def logits(home: Path, adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_peft(home / "model", adapter)(random_steps()[0][0][0]).logits  # type: ignore[no-any-return]


# -- adapters that start in the weight


@pytest.fixture(scope="module", params=["pissa", "olora"])
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """PEFT's three steps from such a start, and its start itself."""
    import peft
    from transformers import AutoModelForCausalLM

    home, init = tmp_path_factory.mktemp("begun"), request.param
    random_model("phi3" if init == "pissa" else "qwen3").save_pretrained(home / "model")  # type: ignore[operator]
    base = AutoModelForCausalLM.from_pretrained(home / "model", attn_implementation="eager")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=init, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    start = {name: value.detach().clone().numpy() for name, value in trained_parameters(model)}
    lora = LoraConfig.for_table(table_of(home / "model"), rank=4, alpha=8, target_modules=EVERY, init=init)
    return peft_steps(home, model) | {"begin": start, "lora": lora}


FSDP: dict[str, tuple[int, dict[str, Any]]] = {"fsdp-1": (1, {"shard_size": 1}), "fsdp-2": (2, {"shard_size": 2})}


@pytest.mark.parametrize("layout", ["one", "tp2", "tp2-sp", *FSDP])
def test_a_start_in_the_weight_is_peft_s(begun: dict[str, Any], layout: str) -> None:
    """Values and three steps; and the base is not touched."""
    options: dict[str, Any] = {"lora": begun["lora"]}
    if layout in FSDP:
        options["settings"] = {"backend": "fsdp"} | FSDP[layout][1]
    world_size, dims = (FSDP[layout][0], {}) if layout in FSDP else LAYOUTS[layout]
    found = mswift_run(begun["home"], world_size, dims, **options, fresh=True)["weights"]
    kept = {n: v for n, v in found.items() if not n.endswith(".start")}
    assert max(differences({"begin": kept}, begun, ("begin",)).values()) <= TOLERANCE
    assert all(np.array_equal(found[n.replace(".weight", ".start")], v) for n, v in kept.items())
    trained = mswift_run(begun["home"], world_size, dims, **options)
    trained["weights"] = {n: v for n, v in trained["weights"].items() if not n.endswith(".start")}
    assert {n: d for n, d in differences(trained, begun, ALL).items() if not d <= TOLERANCE} == {}
    assert trained["trainable"] == begun["trainable"]
    assert layout in FSDP or all(rank["base_untouched"] for rank in trained["ranks"])


def test_its_export_is_an_adapter_of_the_base_as_it_was(begun: dict[str, Any], tmp_path: Path) -> None:
    """Resumed at another layout bit for bit, the start among it; a plain LoRA of twice the rank to PEFT."""
    home = begun["home"]
    before = hashes(home)
    found = mswift_run(home, *LAYOUTS["tp2-sp"], lora=begun["lora"], run=tmp_path / "run")
    resumed = mswift_run(home, *LAYOUTS["pp2"], lora=begun["lora"], resume=tmp_path / "run" / "checkpoint-5")
    assert bitwise_equal([resumed["weights"], found["weights"]])
    other = {"lora": begun["lora"], "settings": {"backend": "fsdp", "shard_size": 2}}
    resumed = mswift_run(home, 2, {}, **other, resume=tmp_path / "run" / "checkpoint-5")
    assert bitwise_equal([resumed["weights"], found["weights"]])
    export_adapter(tmp_path / "run" / "checkpoint-5", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    ours = logits(home, tmp_path / "adapter")
    assert difference(ours, torch.from_numpy(found["trained_logits"])) <= TOLERANCE
    assert difference(ours, torch.from_numpy(found["logits"])) > 0.05, "training changed nothing"
    assert hashes(home) == before


def test_the_randomised_start_is_nearly_the_exact_one() -> None:
    from mswift.tuners.factors import factorised

    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)) * 0.7 ** torch.arange(32)
    products = [b @ a for a, b in (factorised(weight, 4, 2.0, init, 7) for init in ("pissa", "pissa_niter_16"))]
    again = factorised(weight, 4, 2.0, "pissa_niter_16", 7)
    assert torch.equal(products[1], again[1] @ again[0])
    assert difference(products[1], products[0]) < 1e-3
    left, values, right = torch.linalg.svd(weight)
    assert difference(2.0 * products[0], left[:, :4] * values[:4] @ right[:4]) < 1e-5


# -- rules left out


@contextmanager
def lengths_of_this_rank_alone() -> Iterator[None]:
    """DoRA's rows of a row-parallel base measured by their part here."""
    from mswift.parallel import fused_lora

    with patch.object(fused_lora.dist, "all_reduce", lambda *_, **__: None):
        yield


@contextmanager
def lengths_that_learn() -> Iterator[None]:
    """DoRA's lengths with a gradient."""
    from mswift.parallel import fused_lora

    lengths = fused_lora.FusedLora.lengths.__wrapped__
    with patch.object(fused_lora.FusedLora, "lengths", lengths):
        yield


@contextmanager
def biases_scaled_as_well() -> Iterator[None]:
    from mswift.parallel import fused_lora

    forward = fused_lora.FusedLora.forward
    with patch.object(
        fused_lora.FusedLora, "forward", lambda self, x, out, weight, _bias: forward(self, x, out, weight, None)
    ):
        yield


@contextmanager
def one_learning_rate() -> Iterator[None]:
    from mswift.parallel.megatron import optimizer

    with patch.object(optimizer, "IS_LORA_B", "nothing"):
        yield


BREAKS = {
    "lengths_of_this_rank_alone": ("dora", "tp2", "logits"),
    "lengths_that_learn": ("dora", "one", "gradients"),
    "biases_scaled_as_well": ("dora, biases", "one", "logits"),
    "one_learning_rate": ("lora+", "tp2", "weights"),
    "sequence marks": ("dora", "tp2-sp", "gradients"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_rule_is_seen(truth: Any, broken: str) -> None:
    kind, layout, what = BREAKS[broken]
    expected = truth(kind)
    name = broken if broken == "sequence marks" else f"tests/cpu/test_adapters_kinds.py:{broken}"
    found = run(expected["home"], kind, layout, broken=name)
    assert max(differences(found, expected, (what,)).values()) > 10 * TOLERANCE
