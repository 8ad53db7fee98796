"""Answering with GPTQ and AWQ weights, which are dequantised while they are loaded, adapters on them too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mswift.cli.main import main
from mswift.errors import CheckpointError, ConfigError
from mswift.infer.dequantised import is_dequantised
from mswift.infer.loading import load_adapters, load_model
from tests.support.adapters import random_adapter
from tests.support.quantised import AWQ, GPTQ, quantise_directory
from tests.support.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 19)[None]
KINDS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "gptq": (GPTQ, "qwen2", {"tie_word_embeddings": True}),
    "experts": (AWQ, "qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
}


def quantised(kind: str, home: Path) -> Path:
    how, model_type, sizes = KINDS[kind]
    tiny_tokenizer(home / "base")
    tiny_model(home / "base", model_type, num_hidden_layers=2, **sizes)
    quantise_directory(home / "base", how, home / "q")
    return home / "q"


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_model_of_the_dequantised_weights(kind: str, tmp_path: Path) -> None:
    path = quantised(kind, tmp_path)
    ours = load_model(path, None, CPU)
    theirs = AutoModelForCausalLM.from_pretrained(f"{path}-plain")
    assert ours.dtype == torch.float16
    assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)
    assert not hasattr(ours.config, "quantization_config")
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    random_adapter(tmp_path / "adapter", Path(f"{path}-plain"))
    with torch.no_grad():
        adapted, expected = (
            load_adapters(load_model(each, "float32", CPU), {"own": tmp_path / "adapter"})(TOKENS).logits
            for each in (path, Path(f"{path}-plain"))
        )
    assert torch.equal(adapted, expected)
    assert (adapted - ours(TOKENS).logits).abs().max() > 0.1


def test_a_missing_part_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = quantised("gptq", tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="mlp.up_proj.scales: is absent"):
        load_model(path, None, CPU)


def test_what_transformers_dequantises_itself_is_left_to_it(tmp_path: Path) -> None:
    path = quantised("gptq", tmp_path)
    assert is_dequantised(path)
    config = json.loads((path / "config.json").read_text())
    for how in (None, {"quant_method": "bitsandbytes"}, {"quant_method": "fp8"}):
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
        assert not is_dequantised(path)
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": GPTQ | {"bits": 3}}))
    with pytest.raises(ConfigError, match="bits is 3"):
        load_model(path, None, CPU)


def test_the_gate_to_serving_names_the_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = quantised("gptq", tmp_path)
    assert main(["handover", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"{path} holds codes of gptq" in said
    assert f"mswift convert --model {path} --to hf --output_dir {path}-hf" in said
    assert main(["handover", str(path), "--gate_engines"]) == 0
