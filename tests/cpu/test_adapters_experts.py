"""Adapters of experts, routers and shared experts on Megatron compute what PEFT computes, at any layout.

`all-linear` of a mixture of experts: PEFT's own names, numbers of parameters, logits, gradients, and weights after
three steps (1e-5); the stacked adapters of transformers 5 and the older ones, one for every expert's linear.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from mswift.errors import ConfigError, LayoutError
from mswift.tuners.export import export_adapter
from tests.cpu.test_adapters_moe import of_transformers_4
from tests.support.adapters import difference, hashes, load_peft
from tests.support.family_configs import family_config
from tests.support.lora_parity import bitwise_equal, mswift_run, peft_run
from tests.support.parity import VOCAB, differences, random_steps

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "tp2-sp-etp1": (2, {"tp": 2, "sequence_parallel": True, "etp": 1}),
    "etp2": (2, {"etp": 2}),
    "pp2": (2, {"pp": 2}),
    "ep2": (2, {"ep": 2}),
    "dp2": (2, {}),
    "etp2-ep2": (4, {"tp": 2, "sequence_parallel": True, "ep": 2}),
}
CASES = {
    "qwen3_moe": ("one", "tp2-sp", "pp2", "ep2", "etp2"),
    "qwen2_moe": ("one", "tp2-sp", "tp2-sp-etp1", "dp2"),
    "deepseek_v3": ("one", "etp2-ep2"),
    "mixtral": ("ep2",),
}
FSDP: dict[str, Any] = {"backend": "fsdp", "recompute_blocks": 2}
ALL = ("logits", "loss", "grad_norm", "gradients", "weights", "momentum_buffer")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family -> PEFT's results, computed once."""
    known: dict[str, dict[str, Any]] = {}

    def of(family: str) -> dict[str, Any]:
        if family not in known:
            config = family_config(family, vocab_size=VOCAB, num_hidden_layers=2)
            saved = ("embed_tokens", "lm_head") if family == "mixtral" else ()
            known[family] = peft_run(tmp_path_factory.mktemp(family), config, ("all-linear",), saved)
        return known[family]

    return of


@pytest.mark.parametrize(("family", "layout"), [(f, layout) for f, layouts in CASES.items() for layout in layouts])
def test_three_steps_equal_peft(truth: Any, family: str, layout: str) -> None:
    expected = truth(family)
    found = mswift_run(expected["home"], *LAYOUTS[layout])
    assert {n: d for n, d in differences(found, expected, ALL).items() if not d <= TOLERANCE} == {}
    assert found["trainable"] == expected["trainable"]
    assert any("experts" in name for name in found["gradients"])
    assert any("gate.lora" in name for name in found["gradients"])
    for rank in found["ranks"]:
        assert rank["base_untouched"]  # a router's correction bias among it
        assert rank["buffered_frozen"] == 0
        assert rank["gradient_elements"] == rank["trained_elements"]
        frozen, trained = rank["held"]
        assert (frozen.gradients, frozen.optimizer) == (0, 0)
        assert min(frozen.elements, trained.elements) > 0


@pytest.mark.parametrize(("family", "world_size"), [("qwen3_moe", 1), ("qwen2_moe", 2), ("deepseek_v3", 2)])
def test_transformers_model_equals_peft(truth: Any, family: str, world_size: int) -> None:
    """PEFT's own layers on parameters that are cut over ranks, and computed again."""
    expected = truth(family)
    found = mswift_run(expected["home"], world_size, {}, settings=FSDP | {"shard_size": world_size})
    assert {n: d for n, d in differences(found, expected, ALL).items() if not d <= TOLERANCE} == {}
    assert found["trainable"] == expected["trainable"]
    assert any("experts" in name for name in found["gradients"])


def test_the_engines_share_starts_and_checkpoints(truth: Any, tmp_path: Path) -> None:
    home, fsdp = truth("qwen3_moe")["home"], FSDP | {"shard_size": 2}
    starts = [mswift_run(home, 1, {}, fresh=True), mswift_run(home, 2, {}, fresh=True, settings=fsdp)]
    assert bitwise_equal([start["weights"] for start in starts])
    saved = mswift_run(home, *LAYOUTS["tp2-sp"], run=tmp_path / "run")
    resumed = mswift_run(home, 2, {}, settings=fsdp, resume=tmp_path / "run" / "checkpoint-5")
    for part in ("weights", "optimizer"):
        assert bitwise_equal([resumed[part], saved[part]])


@pytest.mark.parametrize("layout", ["ep2", "etp2"])
def test_the_start_does_not_depend_on_the_layout(truth: Any, layout: str) -> None:
    home = truth("qwen3_moe")["home"]
    one, other = (mswift_run(home, *LAYOUTS[name], fresh=True)["weights"] for name in ("one", layout))
    assert bitwise_equal([one, other])
    for name, values in one.items():
        assert values.any() == ("lora_A" in name)


def test_exported_adapters_are_the_trained_model(truth: Any, tmp_path: Path) -> None:
    """Saved with experts cut, resumed bit for bit with the experts spread; PEFT gives the same logits."""
    home = truth("qwen3_moe")["home"]
    before = hashes(home)
    found = mswift_run(home, *LAYOUTS["tp2-sp"], run=tmp_path / "run")
    resumed = mswift_run(home, *LAYOUTS["ep2"], resume=tmp_path / "run" / "checkpoint-5")
    for part in ("weights", "optimizer"):
        assert bitwise_equal([resumed[part], found[part]])
    export_adapter(tmp_path / "run" / "checkpoint-5", tmp_path / "adapter")
    assert hashes(home) == before
    with torch.no_grad():
        peft = load_peft(home / "model", tmp_path / "adapter")(random_steps()[0][0][0]).logits
    assert difference(peft, torch.from_numpy(found["trained_logits"])) <= TOLERANCE
    assert difference(peft, torch.from_numpy(found["logits"])) > 0.1, "training changed nothing"


def test_one_lora_an_expert(truth: Any, tmp_path: Path) -> None:
    """A file of transformers 4: PEFT's logits at the start, one model at any layout, exported under its own names."""
    model = truth("mixtral")["home"] / "model"
    (tmp_path / "model").symlink_to(model)
    stored = of_transformers_4(model, tmp_path / "adapter", ("v_proj", "w1", "w2", "w3"))
    one = mswift_run(tmp_path, *LAYOUTS["one"])
    with torch.no_grad():
        peft = load_peft(model, tmp_path / "adapter")(random_steps()[0][0][0]).logits
    assert difference(torch.from_numpy(one["logits"]), peft) <= TOLERANCE
    other = mswift_run(tmp_path, *LAYOUTS["ep2"], run=tmp_path / "run")
    assert max(differences(other, one, ALL).values()) <= TOLERANCE
    export_adapter(tmp_path / "run" / "checkpoint-5", tmp_path / "exported")
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "exported" / "adapter_model.safetensors")
    assert exported.keys() == stored.keys()
    for name, tensor in exported.items():
        short = name.removeprefix("base_model.model.")
        np.testing.assert_array_equal(tensor.numpy(), other["weights"][short])


def test_one_lora_an_expert_is_refused_where_experts_are_stacked() -> None:
    from mswift.parallel.fsdp.adapters import check_lora
    from mswift.tuners.lora import LoraConfig
    from mswift.tuners.settings import PeftSettings

    settings = PeftSettings(rank=4, alpha=8, target_modules=("w1",))
    with pytest.raises(ConfigError, match=r"a LoRA for the linear of every expert.* use --backend megatron"):
        check_lora(LoraConfig(settings, per_expert=True))


@contextmanager
def no_sum_over_expert_tensor_ranks() -> Iterator[None]:
    from mswift.parallel import fused_lora

    with patch.object(fused_lora.FusedLora, "_summed_gradient", lambda _self, matrix: matrix):
        yield


@contextmanager
def experts_taken_for_dense() -> Iterator[None]:
    """Their gradients summed over the wrong ranks."""
    from mswift.parallel import lora

    mark = lora.mark
    with patch.object(lora, "mark", lambda p, slot, base, cut: mark(p, slot._replace(is_expert=False), base, cut)):
        yield


@contextmanager
def experts_in_another_order() -> Iterator[None]:
    from mswift.parallel import adapters

    moved = adapters.replace
    with patch.object(
        adapters, "replace", lambda a, **k: moved(a, **{n: (v + 1) % 8 if n == "expert" else v for n, v in k.items()})
    ):
        yield


@contextmanager
def a_router_without_adapter() -> Iterator[None]:
    from mswift.parallel import lora

    with patch.object(lora.ParameterLora, "forward", lambda _self, weight: weight):
        yield


def test_experts_taken_for_dense_are_seen(truth: Any) -> None:
    """A rank updates a share of what it has, as if the others had the same experts."""
    broken = "tests/cpu/test_adapters_experts.py:experts_taken_for_dense"
    with pytest.raises(LayoutError, match=r"mlp\.experts\..* written 0 to 1 times"):
        mswift_run(truth("qwen3_moe")["home"], *LAYOUTS["ep2"], broken=broken)


BREAKS = {
    "no_sum_over_expert_tensor_ranks": ("etp2", "gradients"),
    "experts_in_another_order": ("one", "logits"),
    "a_router_without_adapter": ("one", "logits"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_rule_is_seen(truth: Any, broken: str) -> None:
    layout, what = BREAKS[broken]
    expected = truth("qwen3_moe")
    found = mswift_run(expected["home"], *LAYOUTS[layout], broken=f"tests/cpu/test_adapters_experts.py:{broken}")
    assert max(differences(found, expected, (what,)).values()) > 10 * TOLERANCE
