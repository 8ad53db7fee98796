"""Strict loading of models and adapters: what does not fit is refused by name, what fits equals PEFT."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mswift.errors import CheckpointError, ConfigError
from mswift.infer.loading import load_adapters, load_model, load_tokenizer, pick_device
from tests.support.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_tokenizer(path)
    tiny_model(path, num_hidden_layers=2)
    return path


@pytest.fixture(scope="module", params=["linears", "modules_to_save", "embedding"])
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A random adapter, as PEFT saves it."""
    path = tmp_path_factory.mktemp("adapter")
    options: dict[str, Any] = {
        "linears": {"target_modules": "all-linear"},
        "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    }[request.param]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, **options))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return path


def _copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def _edit(path: Path, name: str, change: Any) -> None:
    """Apply `change` to the tensors of a safetensors file."""
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name, metadata={"format": "pt"})


def test_an_adapter_gives_the_logits_that_peft_gives(base: Path, adapter: Path) -> None:
    ours = load_adapters(load_model(base, None, CPU), {"own": adapter})
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    plain = load_model(base, None, CPU)
    with torch.no_grad():
        assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)
        assert not torch.allclose(ours(TOKENS).logits, plain(TOKENS).logits, atol=1e-3)


def test_an_adapter_with_a_tensor_too_few_or_too_many_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    weights = "adapter_model.safetensors"
    short = _copy(adapter, tmp_path / "short")
    name = sorted(load_file(short / weights))[-1]
    _edit(short, weights, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"--adapters {short}: .*missing: {name}"):
        load_adapters(load_model(base, None, CPU), {"own": short})
    long = _copy(adapter, tmp_path / "long")
    extra = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    _edit(long, weights, lambda tensors: tensors.update({extra: torch.zeros(4, 64)}))
    with pytest.raises(CheckpointError, match=rf"not used: {extra}"):
        load_adapters(load_model(base, None, CPU), {"own": long})


def test_an_adapter_of_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    tiny_model(tmp_path, num_hidden_layers=2, hidden_size=32)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit --model .*32"):
        load_adapters(load_model(tmp_path, None, CPU), {"own": adapter})


def test_an_adapter_for_modules_that_the_model_lacks_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = _copy(adapter, tmp_path)
    config = json.loads((copy / "adapter_config.json").read_text())
    config["target_modules"] = ["query_key_value"]
    (copy / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="query_key_value"):
        load_adapters(load_model(base, None, CPU), {"own": copy})


def test_a_damaged_adapter_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = _copy(adapter, tmp_path)
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is damaged"):
        load_adapters(load_model(base, None, CPU), {"own": copy})


def test_a_model_with_a_tensor_too_few_too_many_or_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights = "model.safetensors"
    changes = {
        rf"missing: {name}": lambda tensors: tensors.pop(name),
        r"not part of the model: model\.extra": lambda tensors: tensors.update({"model.extra": torch.zeros(2)}),
        rf"{name} has shape \(95, 64\) where config.json says \(96, 64\)": lambda tensors: tensors.update(
            {name: tensors[name][:95].contiguous()}
        ),
    }
    for number, (message, change) in enumerate(changes.items()):
        copy = _copy(base, tmp_path / str(number))
        _edit(copy, weights, change)
        with pytest.raises(CheckpointError, match=message):
            load_model(copy, None, CPU)
    assert load_model(base, None, CPU).dtype == torch.float32


def test_a_truncated_or_absent_weights_file_is_refused(base: Path, tmp_path: Path) -> None:
    copy = _copy(base, tmp_path)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(copy, None, CPU)
    weights.unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        load_model(copy, None, CPU)


def test_an_unknown_architecture_and_code_in_the_directory_are_refused(base: Path, tmp_path: Path) -> None:
    copy = _copy(base, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "qwen33"}))
    with pytest.raises(ConfigError, match="qwen33"):
        load_model(copy, None, CPU)
    (copy / "own.py").write_text("raise SystemExit('the code of a model directory ran')\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_model(copy, None, CPU)


def test_a_broken_tokenizer_is_refused(base: Path, tmp_path: Path) -> None:
    copy = _copy(base, tmp_path)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(copy)


def test_the_dtype_is_the_checkpoints_unless_asked_otherwise(base: Path) -> None:
    assert load_model(base, "bfloat16", CPU).dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device cuda.*--device auto"):
        pick_device("cuda")
    assert pick_device("auto") == CPU


def test_a_cap_on_attention_is_not_left_out(tmp_path: Path) -> None:
    """transformers' default attention of Gemma 2 has no cap; what vLLM and training compute has one."""
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 10}
    tiny_tokenizer(tmp_path)
    tiny_model(tmp_path, "gemma2", num_hidden_layers=2, sliding_window=8, use_cache=True, **caps)
    own = load_model(tmp_path, None, CPU)
    eager, default = (
        AutoModelForCausalLM.from_pretrained(tmp_path, **kind) for kind in ({"attn_implementation": "eager"}, {})
    )
    with torch.no_grad():
        found, expected, without = (model(TOKENS).logits for model in (own, eager, default))
    assert torch.equal(found, expected)
    assert (without - expected).abs().max() > 0.01
