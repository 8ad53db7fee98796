"""Why `--tuner_type xlora` is refused: PEFT's X-LoRA does not come back from its files. One that does fails here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from safetensors.torch import load_file

from mswift.errors import ConfigError
from mswift.infer.loading import load_adapters
from tests.support.methods import tiny

TOKENS = torch.arange(20).view(2, 10)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("loras")
    for number in range(2):
        settings = LoraConfig(
            r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        base = tiny()
        torch.manual_seed(number)  # the model has seeded it
        get_peft_model(base, settings).save_pretrained(str(folder / str(number)))  # type: ignore[arg-type]
    return [str(folder / str(number)) for number in range(2)]


def mixed(loras: list[str], names: str) -> Any:
    settings = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=64, xlora_depth=2, xlora_size=16, layerwise_scalings=True,
        adapters=dict(zip(names, loras, strict=True)),
    )  # fmt: skip
    return get_peft_model(tiny(), settings).eval()  # type: ignore[arg-type]


def test_names_other_than_numbers_end_with_a_key_error(loras: list[str]) -> None:
    with pytest.raises(KeyError, match="a"):
        mixed(loras, "ab")(TOKENS)


def test_a_file_lacks_the_first_layer_of_the_classifier(loras: list[str], tmp_path: Path) -> None:
    model = mixed(loras, "01")
    classifier = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.partition("classifier.")[2] for name in classifier} == {
        "layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias",
    }  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.partition("classifier.")[2] for name in saved} == {"layers.3.weight", "layers.3.bias"}
    with torch.no_grad():
        again: Any = PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()  # type: ignore[arg-type]
        assert (again(TOKENS).logits - model(TOKENS).logits).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="X-LoRA computes every token by a pass without a cache first"):
        load_adapters(tiny(), {"mixed": tmp_path})  # type: ignore[arg-type]
