"""`mswift convert` of adapters: PEFT directory -> torch_dist -> PEFT directory bit for bit; PEFT is the oracle."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mswift.cli.main import main
from mswift.tuners.export import export_adapter
from tests.cpu.test_adapters_variants import peft_adapter
from tests.support.adapters import edit_config, load_peft, random_model
from tests.support.commands import command, make_home, run

SIZES = {"num_hidden_layers": 2, "vocab_size": 101}
TOKENS = torch.arange(100).view(2, 50)
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("convert") / "base"
    random_model(path, **SIZES)
    return path


def convert(source: Path, to: str, target: Path, *flags: str, status: int = 0) -> None:
    assert main(["convert", "--model", str(source), "--to", to, "--output_dir", str(target), *flags]) == status


def same_files(a: Path, b: Path) -> None:
    """Equal tensors (bits, names, dtypes) and equal adapter_config.json, byte for byte."""
    one, other = load_file(a / FILE), load_file(b / FILE)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name
    assert (a / CONFIG).read_bytes() == (b / CONFIG).read_bytes()


VARIANTS: dict[str, dict[str, Any]] = {
    "different A": {"target_modules": ALL},
    "rsdora": {"use_dora": True, "use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.5}},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "chosen": {"layers_to_transform": [1], "exclude_modules": ["up_proj"], "lora_bias": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_the_same_adapter(base: Path, tmp_path: Path, variant: str) -> None:
    adapter = peft_adapter(tmp_path / "a", base, **VARIANTS[variant])
    (adapter / "tokenizer.json").write_text("{}")
    convert(adapter, "megatron", tmp_path / "m")
    convert(tmp_path / "m", "hf", tmp_path / "b")
    same_files(adapter, tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"
    for pair in ([adapter, tmp_path / "m"], [tmp_path / "m", tmp_path / "b"], [tmp_path / "m"], [tmp_path / "b"]):
        assert main(["verify", *map(str, pair)]) == 0
    assert torch.equal(load_peft(base, tmp_path / "b")(TOKENS).logits, load_peft(base, adapter)(TOKENS).logits)


def test_dtypes_of_single_tensors_and_odd_bits_survive(base: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(tmp_path / "a", base)
    tensors = load_file(adapter / FILE)
    names = sorted(tensors)
    tensors[names[0]] = tensors[names[0]].to(torch.bfloat16)
    tensors[names[1]][0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    save_file(tensors, adapter / FILE)
    convert(adapter, "megatron", tmp_path / "m")
    convert(tmp_path / "m", "hf", tmp_path / "b")
    same_files(adapter, tmp_path / "b")


def test_the_base_is_found_by_name_or_by_flag(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = peft_adapter(tmp_path / "a", base)
    edit_config(adapter, base_model_name_or_path="somebody/some-model")
    convert(adapter, "megatron", tmp_path / "m", status=2)
    assert "its base is 'somebody/some-model'" in (text := capsys.readouterr().err)
    assert "--base_model DIR" in text
    (tmp_path / "config-only").mkdir()
    shutil.copy(base / "config.json", tmp_path / "config-only")
    convert(adapter, "megatron", tmp_path / "m", "--base_model", str(tmp_path / "config-only"))
    convert(tmp_path / "m", "hf", tmp_path / "b")
    same_files(adapter, tmp_path / "b")


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_A), f"lacks {Q_A} [4, 64]"),
        (lambda t: t.update({Q_A: torch.zeros(3, 64)}), f"{Q_A} has shape [3, 64]"),
        (lambda t: t.update({Q_A.replace(".0.", ".7."): torch.zeros(4, 64)}), "has no place in this adapter"),
        (lambda t: t.update({Q_A: torch.zeros(4, 64, dtype=torch.int8)}), "is I8"),
    ],
)
def test_tensors_that_do_not_fit(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    adapter = peft_adapter(tmp_path / "a", base)
    tensors = load_file(adapter / FILE)
    change(tensors)
    save_file(tensors, adapter / FILE)
    convert(adapter, "megatron", tmp_path / "m", status=1)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_unknown_fields_are_refused_by_name(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = peft_adapter(tmp_path / "a", base)
    for field, value in (("use_some_new_thing", True), ("bias", "all"), ("trainable_token_indices", [1])):
        copy = shutil.copytree(adapter, tmp_path / field)
        edit_config(copy, **{field: value})
        convert(copy, "megatron", tmp_path / "m", status=2)
        assert field in capsys.readouterr().err


def test_a_flipped_byte_is_found(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = peft_adapter(tmp_path / "a", base)
    convert(adapter, "megatron", tmp_path / "m")
    convert(tmp_path / "m", "hf", tmp_path / "b")
    data = bytearray((tmp_path / "b" / FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / "b" / FILE).write_bytes(data)
    assert main(["verify", str(tmp_path / "b")]) == 1
    assert main(["verify", str(adapter), str(tmp_path / "b")]) == 1
    assert "v_proj.lora_B.weight: bits differ" in capsys.readouterr().out
    convert(tmp_path / "b", "megatron", tmp_path / "n", status=1)
    assert "is not what mswift_manifest.json there says" in capsys.readouterr().err


def test_the_checkpoint_of_a_lora_run_is_converted_as_it_is_exported(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    flags = ["--tuner_type", "lora", "--train_iters", "1", "--modules_to_save", "lm_head"]
    run(command(home, "sft", home / "run", *flags))
    convert(home / "run", "hf", home / "converted")
    export_adapter(home / "run" / "checkpoint-1", home / "exported")
    same_files(home / "converted", home / "exported")
    convert(home / "converted", "megatron", home / "m")
    assert main(["verify", str(home / "run"), str(home / "m")]) == 0
    convert(home / "run", "hf", home / "x", "--optimizer", "true", status=2)
