"""What a run continues on: the same base in any format, another one in any part that training would move."""

import json
from pathlib import Path

import pytest

from mswift.converters.engine import convert
from mswift.converters.reader import WeightReader
from mswift.errors import ConfigError
from mswift.train.identity import base_fingerprint, check_adapter, check_base
from mswift.tuners.peft_config import CONFIG_FILE
from tests.support.checkpoints import random_model, random_tensors, tiny_config, write_model


def test_a_base_is_the_same_in_any_format(tmp_path: Path) -> None:
    random_model(tmp_path / "hf", "qwen2", shards=2)
    convert(tmp_path / "hf", tmp_path / "megatron", "megatron")
    one, other = (base_fingerprint(WeightReader(tmp_path / name)) for name in ("hf", "megatron"))
    assert one == other
    assert {"config.json", "model.norm.weight", "model.layers.*.self_attn.k_proj.bias"} <= one.keys()
    check_base(one, other, "a", "b")


CONFIG = tiny_config("qwen3")


@pytest.mark.parametrize("name", random_tensors(CONFIG))
@pytest.mark.parametrize("row", [0, -1])
def test_another_first_or_last_row_is_seen_and_named(tmp_path: Path, name: str, row: int) -> None:
    tensors = random_tensors(CONFIG)
    write_model(tmp_path / "then", CONFIG, tensors)
    tensors[name][row] ^= 1
    write_model(tmp_path / "now", CONFIG, tensors)
    then, now = (base_fingerprint(WeightReader(tmp_path / folder)) for folder in ("then", "now"))
    kind = ".".join("*" if part.isdecimal() else part for part in name.split("."))
    assert {key for key in then if then[key] != now[key]} == {kind}
    with pytest.raises(ConfigError, match=rf"--model now: its {kind.replace('*', '.')} .* \(then\)"):
        check_base(then, now, "now", "then")


def test_another_function_or_dtype_is_seen_and_a_remark_is_not(tmp_path: Path) -> None:
    random_model(tmp_path / "then")
    random_model(tmp_path / "remark", transformers_version="9.9")
    random_model(tmp_path / "rope", rope_theta=5000.0)
    random_model(tmp_path / "dtype", dtype="F16")
    then, remark, rope, dtype = (
        base_fingerprint(WeightReader(tmp_path / name))["config.json"] for name in ("then", "remark", "rope", "dtype")
    )
    assert remark == then
    assert len({then, rope, dtype}) == 3


def test_another_adapter_is_refused_by_its_flag(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    config = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj"], "base_model_name_or_path": "there"}
    (tmp_path / "hf" / CONFIG_FILE).write_text(json.dumps(config))
    check_adapter(tmp_path, json.dumps(config | {"base_model_name_or_path": "moved"}).encode())
    for field, value, flag in (("r", 4, "lora_rank"), ("lora_alpha", 16, "lora_alpha"), ("target_modules", [], "t")):
        with pytest.raises(ConfigError, match=rf"--{flag}.* has .*, the command means {re_escape(value)}"):
            check_adapter(tmp_path, json.dumps(config | {field: value}).encode())


def test_what_a_method_plans_by_the_length_of_the_run_is_refused_by_the_flag_of_that(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    config = {"peft_type": "ADALORA", "total_step": 10, "target_r": 8}
    (tmp_path / "hf" / CONFIG_FILE).write_text(json.dumps(config))
    for field, value, flag in (("total_step", 20, "train_iters"), ("target_r", 4, "lora_rank")):
        with pytest.raises(ConfigError, match=rf"--{flag}: .* has {config[field]}, the command means {value}"):
            check_adapter(tmp_path, json.dumps(config | {field: value}).encode())


def re_escape(value: object) -> str:
    """A value as it is printed, for a pattern."""
    import re

    return re.escape(str(value))
