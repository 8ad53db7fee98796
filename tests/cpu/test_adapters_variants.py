"""Variants of LoRA (rsLoRA, DoRA, ranks by module, ...): tensors and merged weights are PEFT's."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mswift.errors import ConfigError
from mswift.tuners.adapter import PeftAdapter
from mswift.tuners.merge import merge
from mswift.tuners.settings import PeftSettings
from mswift.tuners.shapes import promised_shapes
from tests.support.adapters import difference, load_peft, random_model, table_of

WEIGHTS = 1e-6  # max|a-b| / max|b| in fp32: another order of the same sums
SIZES = {"num_hidden_layers": 3, "vocab_size": 101}
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rsdora": {"use_dora": True, "use_rslora": True, "modules_to_save": ["lm_head"]},
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {r".*down_proj": 3.5}},
    "layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "one layer": {"layers_to_transform": 1},
    "excluded": {"exclude_modules": ["v_proj", "model.layers.0.mlp.up_proj"]},
    "excluded by pattern": {"exclude_modules": r".*\.1\..*"},
    "biased": {"lora_bias": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("variants") / "base"
    random_model(path, **SIZES)
    return path


def peft_adapter(path: Path, base: Path, **config: Any) -> Path:
    """A PEFT directory written by PEFT, every trained tensor moved away from its start."""
    import peft
    from transformers import AutoModelForCausalLM

    settings = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]} | config
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tensors_are_those_that_the_configuration_promises(base: Path, tmp_path: Path, variant: str) -> None:
    adapter = PeftAdapter(peft_adapter(tmp_path / "a", base, **VARIANTS[variant]))
    adapter.check(promised_shapes(table_of(base), adapter.settings))
    assert len(adapter.shapes) > 4


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "biased"])
def test_the_merged_model_is_peft_s(base: Path, tmp_path: Path, variant: str) -> None:
    adapter = peft_adapter(tmp_path / "a", base, **VARIANTS[variant])
    merge(base, [adapter], tmp_path / "merged")
    theirs = load_peft(base, adapter).merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert max(difference(ours[name], theirs[name]) for name in theirs) < WEIGHTS
    assert any(not torch.equal(weight, load_file(base / "model.safetensors")[name]) for name, weight in ours.items())


def test_two_dora_adapters_scale_by_the_norms_of_the_base(base: Path, tmp_path: Path) -> None:
    """As PEFT merges several: one after the other, each with the norm of the unmerged weight."""
    one = peft_adapter(tmp_path / "1", base, use_dora=True, target_modules=["q_proj"])
    two = peft_adapter(tmp_path / "2", base, use_dora=True, r=2)
    merge(base, [one, two], tmp_path / "merged")
    model = load_peft(base, one)
    model.load_adapter(str(two), "second")
    theirs = model.merge_and_unload(adapter_names=["default", "second"]).state_dict()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert max(difference(ours[name], theirs[name]) for name in theirs) < WEIGHTS


def test_the_tolerance_sees_a_wrong_scale(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partner: rsLoRA read as LoRA."""
    adapter = peft_adapter(tmp_path / "a", base, use_rslora=True)
    theirs = load_peft(base, adapter).merge_and_unload().state_dict()
    monkeypatch.setattr(PeftSettings, "scale_of", lambda self, name: self.alpha / self.rank)
    merge(base, [adapter], tmp_path / "merged")
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert max(difference(ours[name], theirs[name]) for name in theirs) > 1000 * WEIGHTS


def test_what_the_base_has_no_place_for_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora_bias=True: merge has no bias"):
        merge(base, [peft_adapter(tmp_path / "a", base, lora_bias=True)], tmp_path / "merged")
