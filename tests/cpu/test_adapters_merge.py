"""`mswift merge` against PEFT: merge_and_unload's weights, the unmerged model's logits, an untouched base."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mswift.cli.main import main
from mswift.converters.engine import convert
from mswift.errors import CheckpointError, ConfigError
from mswift.tuners import files
from mswift.tuners.merge import merge
from tests.support.adapters import difference, edit_config, hashes, load_peft, random_adapter, random_model
from tests.support.checkpoints import random_model as bf16_model
from tests.support.family_configs import family_config
from tests.support.quantised import FP8, quantise_fp8, write_typed
from tests.support.tiny import tiny_model, tiny_tokenizer

BOTH = ("embed_tokens", "lm_head")
SIZES = {"num_hidden_layers": 2, "vocab_size": 301}
TOKENS = torch.arange(120).view(2, 60)
WEIGHTS, LOGITS = 1e-6, 5e-6  # max|a-b| / max|b| against PEFT in fp32: another order of one sum


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    random_model(path / "untied", **SIZES)
    random_model(path / "tied", tie_word_embeddings=True, **SIZES)
    random_model(path / "qwen2", "qwen2", **SIZES)
    tiny_tokenizer(path / "untied")
    sharded = random_model(path / "sharded", tie_word_embeddings=True, **SIZES)
    (path / "sharded" / "model.safetensors").unlink()
    sharded.save_pretrained(path / "sharded", max_shard_size="100KB")
    return path


def load(path: Path, **options: Any) -> Any:
    """The transformers model, which must find exactly its tensors."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("block_bytes", [1 << 25, 1000])
@pytest.mark.parametrize(
    ("model", "targets", "saved"),
    [
        ("untied", ("all-linear",), ()),
        ("untied", ("q_proj", "up_proj"), BOTH),
        ("tied", ("all-linear",), BOTH),
        ("tied", ("v_proj",), ()),
        ("sharded", ("all-linear",), BOTH),
        ("qwen2", ("all-linear",), ("lm_head",)),
    ],
)
def test_the_merged_model_is_peft_s(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block_bytes: int,
    model: str,
    targets: tuple[str, ...],
    saved: tuple[str, ...],
) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", block_bytes)
    adapter = random_adapter(tmp_path / "a", models / model, targets, saved)
    before = hashes(models / model), hashes(adapter)
    report = merge(models / model, [adapter], tmp_path / "merged")
    assert (hashes(models / model), hashes(adapter)) == before
    assert not report.untied
    peft = load_peft(models / model, adapter)
    merged = load(tmp_path / "merged")
    assert difference(merged(TOKENS).logits, peft(TOKENS).logits) < LOGITS
    assert difference(load(models / model)(TOKENS).logits, peft(TOKENS).logits) > 0.1
    theirs = peft.merge_and_unload().state_dict()
    changed = 0
    for name, weight in merged.state_dict().items():
        assert difference(weight, theirs[name]) < WEIGHTS, name
        changed += not torch.equal(weight, load_file_of(models / model, name))
    assert changed == 2 * (7 if targets == ("all-linear",) else len(targets)) + len(saved)


def load_file_of(model: Path, name: str) -> torch.Tensor:
    """A weight of the base (a tied head is its embedding)."""
    tensors = {n: t for path in model.glob("*.safetensors") for n, t in load_file(path).items()}
    return tensors.get(name, tensors["model.embed_tokens.weight"])


def test_files_beside_the_weights_are_carried_over(models: Path, tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "a", models / "untied")
    merge(models / "untied", [adapter], tmp_path / "merged")
    ours, base = hashes(tmp_path / "merged"), hashes(models / "untied")
    assert ours.keys() == base.keys()
    assert [name for name in ours if ours[name] != base[name]] == ["model.safetensors"]
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")  # what the adapter was trained with
    merge(models / "untied", [adapter], tmp_path / "again")
    added = hashes(tmp_path / "again").items() - hashes(tmp_path / "merged").items()
    assert [name for name, _ in added] == ["chat_template.jinja"]


def test_a_head_of_its_own_unties_the_model(models: Path, tmp_path: Path) -> None:
    """PEFT trained embedding and head apart on a tied base: config.json says so in the merged model."""
    for model in ("tied", "sharded"):
        adapter = random_adapter(tmp_path / f"a-{model}", models / model, modules_to_save=BOTH)
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors["base_model.model.lm_head.weight"] += 0.1 * torch.randn(301, 64)
        save_file(tensors, adapter / "adapter_model.safetensors")
        edit_config(adapter, ensure_weight_tying=False)
        report = merge(models / model, [adapter], tmp_path / model)
        assert report.untied
        assert json.loads((tmp_path / model / "config.json").read_text())["tie_word_embeddings"] is False
        head = load(tmp_path / model).get_output_embeddings().weight
        assert torch.equal(head, tensors["base_model.model.lm_head.weight"])


def test_two_adapters_are_one_sum(models: Path, tmp_path: Path) -> None:
    """Folding both in one step equals folding them one after the other, to the rounding of the step between."""
    one = random_adapter(tmp_path / "1", models / "untied", ("q_proj",), seed=1)
    two = random_adapter(tmp_path / "2", models / "untied", seed=2)
    merge(models / "untied", [one, two], tmp_path / "both")
    merge(models / "untied", [one], tmp_path / "first")
    merge(tmp_path / "first", [two], tmp_path / "second")
    ours, theirs = load(tmp_path / "both").state_dict(), load(tmp_path / "second").state_dict()
    assert all(difference(ours[name], theirs[name]) < WEIGHTS for name in theirs)


def test_bfloat16_rounds_once(models: Path, tmp_path: Path) -> None:
    """The bf16 weight is the fp64 sum, rounded: at most half a unit in the last place away (and 1e-4 of one)."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(models / "untied", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = random_adapter(tmp_path / "a", tmp_path / "base")
    merge(tmp_path / "base", [adapter], tmp_path / "merged")
    merged, base = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
    lora = load_file(adapter / "adapter_model.safetensors")
    for name, weight in base.items():
        assert merged[name].dtype == torch.bfloat16
        prefix = "base_model.model." + name.removesuffix("weight")
        exact = weight.double()
        if prefix + "lora_A.weight" in lora:
            exact += 2 * lora[prefix + "lora_B.weight"].double() @ lora[prefix + "lora_A.weight"].double()
        ulp = 2.0 ** (torch.frexp(exact).exponent.double() - 8)
        assert ((merged[name].double() - exact).abs() <= 0.5001 * ulp).all(), name


def test_what_does_not_fit_is_refused_and_nothing_is_written(models: Path, tmp_path: Path) -> None:
    random_model(tmp_path / "wide", intermediate_size=128, **SIZES)
    adapter = random_adapter(tmp_path / "a", tmp_path / "wide")
    with pytest.raises(
        CheckpointError, match=r"gate_proj\.lora_B\.weight has shape \[128, 4\], the model needs \[96, 4\]"
    ):
        merge(models / "untied", [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(tmp_path / "wide", [adapter], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--output_dir .*out exists already"):
        merge(tmp_path / "wide", [adapter], tmp_path / "out")
    edit_config(adapter, use_dora=True)  # without its magnitude vectors
    with pytest.raises(CheckpointError, match=r"lacks .*lora_magnitude_vector \[64\]"):
        merge(tmp_path / "wide", [adapter], tmp_path / "dora")
    assert not list(tmp_path.glob(".*"))


def test_an_incomplete_base_is_refused(models: Path, tmp_path: Path) -> None:
    random_model(tmp_path / "base", **SIZES)
    adapter = random_adapter(tmp_path / "a", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.norm\.weight \[64\]"):
        merge(tmp_path / "base", [adapter], tmp_path / "out")
    save_file(tensors | {"model.norm.weight": norm, "extra": norm.clone()}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"extra \[64\] is no tensor of this model"):
        merge(tmp_path / "base", [adapter], tmp_path / "out")


def in_another_form(path: Path, form: str) -> None:
    """A BF16 model as torch.save, DeepSeek or megatron-core store one."""
    tensors = bf16_model(path if form != "megatron" else path.with_name("plain"))
    if form == "megatron":
        convert(path.with_name("plain"), path, "megatron")
    elif form == "bin":
        bits = {n: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) for n, a in tensors.items()}
        torch.save(bits, path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    else:
        write_typed(path / "model.safetensors", quantise_fp8(tensors, (16, 8)))
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] = FP8 | {"weight_block_size": [16, 8]}
        (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("form", "word"),
    [
        ("bin", "pytorch_model.bin"),
        ("fp8", r"quantised weights \(quantization_config: fp8"),
        ("megatron", "a Megatron"),
    ],
)
def test_a_base_in_another_form_is_refused_with_the_command_that_helps(
    form: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command out of the message is run, and then the merge that it proposes."""
    in_another_form(tmp_path / "base", form)
    adapter = random_adapter(tmp_path / "a", tmp_path / "base" / ("hf" if form == "megatron" else ""))
    argv = ["merge", "--adapters", str(adapter), "--output_dir", str(tmp_path / "out"), "--model"]
    assert main([*argv, str(tmp_path / "base")]) == 2
    told = capsys.readouterr().err
    assert re.search(word, told), told
    remedy = re.search(r"mswift (convert .+?); then merge with --model (\S+)", told)
    assert remedy is not None, told
    assert main(shlex.split(remedy[1])) == 0
    assert main([*argv, remedy[2]]) == 0
    assert "21 with a LoRA folded in" in capsys.readouterr().out


def test_a_base_of_mxfp4_is_refused_alike(tmp_path: Path) -> None:
    config = family_config("gpt_oss") | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"\(quantization_config: mxfp4\), .* mswift convert --model "):
        merge(tmp_path, [tmp_path], tmp_path / "out")


MEASURED = """
import resource, sys
from pathlib import Path
import mswift.tuners.merge as m, mswift.tuners.files as files
files.BLOCK_BYTES = 1 << 20
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
m.merge(Path(sys.argv[1]), [Path(sys.argv[2])], Path(sys.argv[3]))
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A base of 134 MB, tensors of 33 MB, blocks of 1 MB: the peak grows by less than one tensor."""
    sizes = {"num_hidden_layers": 1, "vocab_size": 32_768, "hidden_size": 256, "intermediate_size": 32_768}
    tiny_model(tmp_path / "base", tie_word_embeddings=True, **sizes)
    adapter = random_adapter(tmp_path / "a", tmp_path / "base")
    argv = [sys.executable, "-c", MEASURED, str(tmp_path / "base"), str(adapter), str(tmp_path / "out")]
    answer = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert (tmp_path / "base" / "model.safetensors").stat().st_size > 134e6
    assert float(answer.stdout) < 24


def test_the_command(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = random_adapter(tmp_path / "a", models / "tied")
    argv = ["merge", "--model", str(models / "tied"), "--adapters", str(adapter), "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 0
    said = capsys.readouterr()
    assert "14 with a LoRA folded in" in said.out
    assert said.err == ""
    assert main(argv) == 2
    assert "--output_dir" in capsys.readouterr().err


def test_a_base_of_another_name_is_told(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shapes of another model may fit all the same; a copy or a conversion has another name by right: no refusal."""
    adapter = random_adapter(tmp_path / "a", models / "tied")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for number, (said, told) in enumerate([("hub/tied", False), ("hub/other", True), (None, False)]):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": said}))
        argv = ["merge", "--model", str(models / "tied"), "--adapters", str(adapter)]
        assert main([*argv, "--output_dir", str(tmp_path / f"out-{number}")]) == 0
        assert ("was trained on hub/other" in capsys.readouterr().err) == told


def test_the_tolerance_sees_a_wrong_fold(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partner: a scale of alpha in place of alpha / rank."""
    from mswift.tuners.settings import PeftSettings

    adapter = random_adapter(tmp_path / "a", models / "untied")
    theirs = load_peft(models / "untied", adapter)(TOKENS).logits
    with monkeypatch.context() as patch:
        patch.setattr(PeftSettings, "scale_of", lambda self, name: self.alpha)
        merge(models / "untied", [adapter], tmp_path / "scale")
    assert difference(load(tmp_path / "scale")(TOKENS).logits, theirs) > 100 * LOGITS
