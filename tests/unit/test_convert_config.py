"""config.json on its way: published spellings unchanged, fields ignored as asked, what vLLM needs."""

import json
from pathlib import Path
from typing import Any

import pytest

from mswift.cli.main import main
from mswift.converters.catalog import read_config
from mswift.converters.describe import describe
from mswift.converters.engine import convert, plan
from mswift.converters.export_config import config_edits, missing_for_vllm
from mswift.converters.manifest import read_manifest
from mswift.converters.plan import table_for
from mswift.converters.quantization import GroupedCodes, Quantization, quantization_of
from mswift.converters.reader import WeightReader
from mswift.converters.source import SourceOptions
from mswift.converters.verify import verify
from mswift.errors import CheckpointError, ConfigError
from tests.support.checkpoints import random_model, tiny_config
from tests.support.quantised import AWQ, GPTQ

V4 = {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"}
V5 = {
    "rope_theta": None,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0},
    "torch_dtype": None,
    "dtype": "bfloat16",
}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(f"os.{name}", lambda fd: None)


def with_config(path: Path, text: str | None = None, **changes: Any) -> bytes:
    """A random llama whose config.json has these fields (None: not at all); the bytes of it."""
    random_model(path)
    config = {name: value for name, value in (tiny_config() | changes).items() if value is not None}
    (path / "config.json").write_text(text or json.dumps(config, indent=4) + "\n\n")
    return (path / "config.json").read_bytes()


@pytest.mark.parametrize("spelling", [V4, V5], ids=["transformers 4", "transformers 5"])
def test_both_spellings_come_back_byte_for_byte(spelling: dict[str, Any], tmp_path: Path) -> None:
    before = with_config(tmp_path / "hf", **spelling)
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    convert(tmp_path / "m", tmp_path / "back", "hf")
    assert (tmp_path / "m" / "hf" / "config.json").read_bytes() == before
    assert (tmp_path / "back" / "config.json").read_bytes() == before
    spec = table_for(read_config(tmp_path / "back")).spec
    assert (spec.rope.kind, spec.rope.theta, spec.rope.factor) == ("linear", 500000.0, 2.0)


SAVED_BY_OLD_TOOLS = {
    "_attn_implementation_autoset": True, "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "top_k": 50,
    "temperature": 1.0, "length_penalty": 1.0, "unsloth_version": "2024.9", "pruned_heads": {}, "use_mrope": False,
    "add_cross_attention": False, "is_encoder_decoder": False, "tf_legacy_loss": False, "resid_pdrop": 0.0,
    "cross_attention_hidden_size": None, "quantization_config": None, "cache_implementation": "hybrid",
}  # fmt: skip


def test_what_tools_add_is_without_effect() -> None:
    assert table_for(tiny_config() | SAVED_BY_OLD_TOOLS).spec == table_for(tiny_config()).spec


@pytest.mark.parametrize(
    ("name", "value"), [("use_mrope", True), ("is_encoder_decoder", True), ("resid_pdrop", 0.1), ("is_causal", False)]
)
def test_a_value_that_means_something_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is {value}; only"):
        table_for(tiny_config() | {name: value})


def test_ignored_fields_are_recorded_and_honoured_again(tmp_path: Path) -> None:
    before = with_config(tmp_path / "hf", wobble=3, zap="x")
    with pytest.raises(ConfigError, match="'wobble' is not known .*--ignore_config_fields wobble"):
        plan(tmp_path / "hf", "megatron")
    options = SourceOptions(ignored=("wobble", "zap"))
    assert "ignored as asked: wobble, zap" in describe(plan(tmp_path / "hf", "megatron", options), 1 << 30)
    assert "ignored as asked: wobble, zap" in str(
        convert(tmp_path / "hf", tmp_path / "m", "megatron", source_options=options, hash_output=True)
    )
    recorded = read_manifest(tmp_path / "m")
    assert recorded is not None
    assert tuple(recorded.ignored_config_fields) == ("wobble", "zap")
    convert(tmp_path / "m", tmp_path / "back", "hf")
    assert (tmp_path / "back" / "config.json").read_bytes() == before
    for place in ("m", "back"):
        WeightReader(tmp_path / place)
        table_for(read_config(tmp_path / place / "hf" if place == "m" else tmp_path / place))
    (tmp_path / "m" / "mswift_manifest.json").unlink()  # as in a checkpoint of a training that started from there
    for name, content in WeightReader(tmp_path / "back").side_files().items():
        (tmp_path / "m" / "hf" / name).write_bytes(content)
    convert(tmp_path / "m", tmp_path / "third", "hf")
    WeightReader(tmp_path / "third")
    assert (tmp_path / "third" / "config.json").read_bytes() == before
    assert verify(tmp_path / "back", tmp_path / "hf", options=options).equal


def test_a_field_that_is_not_there_cannot_be_ignored(tmp_path: Path) -> None:
    with_config(tmp_path / "hf", wobble=3)
    with pytest.raises(ConfigError, match="--ignore_config_fields wooble: .* has no such field"):
        plan(tmp_path / "hf", "megatron", SourceOptions(ignored=("wobble", "wooble")))


def test_what_vllm_needs_is_named_and_added_when_asked() -> None:
    config = {"model_type": "deepseek_v3", "scoring_func": "sigmoid", "n_group": 8}
    assert missing_for_vllm(config) == {"topk_method": "noaux_tc"}
    assert missing_for_vllm({"model_type": "deepseek_v2", "n_group": None}) == {"n_group": 1, "topk_group": 1}
    assert missing_for_vllm({"model_type": "llama"}) == {}
    assert config_edits(config, None, complete=False) == {}
    assert config_edits(config, "F16", complete=True) == {"topk_method": "noaux_tc"}
    assert config_edits({"torch_dtype": "float32", "dtype": "float16"}, "F16", complete=True) == {
        "torch_dtype": "float16"
    }


def test_the_command_notes_what_vllm_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    before = with_config(tmp_path / "hf")
    monkeypatch.setattr(
        "mswift.converters.export_config._VLLM_NEEDS", {"llama": {"attention_bias": False, "mlp_bias": False}}
    )
    command = ["convert", "--model", str(tmp_path / "hf"), "--to", "hf", "--output_dir"]
    assert main([*command, str(tmp_path / "plain")]) == 0
    assert 'note: vLLM needs fields that config.json lacks: "attention_bias": false' in capsys.readouterr().out
    assert (tmp_path / "plain" / "config.json").read_bytes() == before
    assert main([*command, str(tmp_path / "full"), "--complete_config"]) == 0
    printed = capsys.readouterr().out
    assert "attention_bias is now false" in printed
    assert "note:" not in printed
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config == tiny_config() | {"attention_bias": False, "mlp_bias": False}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'; fp8 .* mxfp4, gptq and awq are"),
        (GPTQ | {"bits": 3}, "bits is 3; 4 and 8 can be read with gptq"),
        (GPTQ | {"bits": True}, "bits is True"),
        (GPTQ | {"group_size": 0}, "group_size is 0; a positive number"),
        (GPTQ | {"desc_act": "static"}, "desc_act is 'static'; true or false"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; gptq and gptq_v2"),
        (GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"}, "format is 'gptq_v2'; checkpoint_format is 'gptq'"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format is True; only False is read"),
        (GPTQ | {"pack_dtype": "int8"}, "pack_dtype is 'int8'; only 'int32' is read"),
        (GPTQ | {"rotation": "hadamard"}, "rotation is 'hadamard'; only None"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic is .*bits or groups of their own"),
        (GPTQ | {"method": "awq"}, "method is 'awq'; quant_method is 'gptq'"),
        (GPTQ | {"wobble": 1}, "wobble of quant_method 'gptq' is not known"),
        (AWQ | {"bits": 8}, "bits is 8; 4 can be read with awq"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'; gemm is read"),
        (AWQ | {"desc_act": True}, "desc_act is True; quant_method 'awq' has none"),
        ({"quant_method": "fp8"}, "weight_block_size is None"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size"),
        ({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}, "fmt is 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "wobble": 1}, "wobble of quant_method 'fp8'"),
        ({"quant_method": "fp8", "weight_block_size": [9, 9], "activation_scheme": "static"}, "activation_scheme is"),
        (["fp8"], "is a JSON list"),
    ],
)
def test_other_quantisations_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        table_for(tiny_config() | {"quantization_config": value})


def test_published_quantisations() -> None:
    deepseek = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip
    gpt_oss = {"modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"], "quant_method": "mxfp4"}
    assert quantization_of({"quantization_config": deepseek}) == Quantization("fp8", (128, 128))
    assert quantization_of({"quantization_config": deepseek | {"scale_fmt": "ue8m0"}}) == Quantization(
        "fp8", (128, 128)
    )
    assert quantization_of({"quantization_config": gpt_oss}) == Quantization("mxfp4")
    assert quantization_of({"quantization_config": None}) is None
    by_autogptq = {
        "batch_size": 1, "bits": 4, "block_name_to_quantize": None, "cache_block_outputs": True, "damp_percent": 0.01,
        "dataset": None, "desc_act": False, "exllama_config": {"version": 1}, "group_size": 128, "pad_token_id": None,
        "max_input_length": None, "model_seqlen": None, "module_name_preceding_first_block": None, "sym": True,
        "modules_in_block_to_quantize": None, "quant_method": "gptq", "tokenizer": None, "true_sequential": True,
        "use_cuda_fp16": False, "use_exllama": True,
    }  # fmt: skip
    by_gptqmodel = {
        "bits": 8, "checkpoint_format": "gptq_v2", "desc_act": True, "dynamic": {"-:.*gate.*": {}}, "format": "gptq_v2",
        "group_size": -1, "lm_head": False, "meta": {"quantizer": ["gptqmodel:7.7.0"]}, "method": "gptq",
        "pack_dtype": "int32", "quant_method": "gptq", "sym": False,
    }  # fmt: skip
    by_autoawq = {
        "bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
        "zero_point": True,
    }  # fmt: skip
    assert quantization_of({"quantization_config": by_autogptq}) == GroupedCodes("gptq", 4, 128, zero_plus=1)
    assert quantization_of({"quantization_config": by_gptqmodel}) == GroupedCodes(
        "gptq", 8, -1, zero_plus=0, zero_wraps=True, act_order=True
    )
    assert quantization_of({"quantization_config": by_autoawq}) == GroupedCodes("awq", 4, 128)


def test_a_model_that_only_says_it_is_quantised_is_refused(tmp_path: Path) -> None:
    with_config(tmp_path / "hf", quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
    with pytest.raises(CheckpointError, match="no tensor is quantised; remove the field"):
        plan(tmp_path / "hf", "megatron")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "llama", "model_type": "qwen2"}', "'model_type' is named twice"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "holds a JSON list"),
        ('{"model_type": ["llama"]}', "model_type ['llama'] is not supported"),
        ('{"model_type": NaN}', "model_type nan is not supported"),
    ],
)
def test_broken_configs(text: str, message: str, tmp_path: Path, capsys: Any) -> None:
    with_config(tmp_path / "hf", text)
    assert main(["convert", "--model", str(tmp_path / "hf"), "--to", "hf", "--output_dir", str(tmp_path / "x")]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000; at most 10,000 layers"),
        ({"hidden_size": 1 << 50}, "'hidden_size' must be a positive integer below"),
        ({"rope_theta": float("inf")}, "'rope_theta' must be a positive number, not inf"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be a positive number, not nan"),
    ],
)
def test_sizes_beyond_all_models_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        table_for(tiny_config() | changes)


def test_a_config_that_is_not_utf8(tmp_path: Path) -> None:
    with_config(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        plan(tmp_path / "hf", "megatron")
