"""LoRA in the space of HF modules: targets, names, shapes, adapter_config.json. Oracle for PEFT's side: tests/cpu."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mswift.converters.adapters import (
    Block,
    HfLinear,
    check_blocks,
    expand_modules_to_save,
    fused_blocks,
    fused_linears,
    trained_name,
)
from mswift.converters.plan import ModelTable, table_for
from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.init import kaiming_uniform
from mswift.tuners.lora import LoraConfig
from mswift.tuners.peft_config import adapter_files, read_peft_config
from mswift.tuners.settings import PeftSettings
from mswift.tuners.shapes import promised_shapes
from mswift.tuners.targets import chosen
from tests.support.family_configs import family_config

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def table(tied: bool = False) -> ModelTable:
    """Qwen3: 2 layers, hidden 32, 4 heads and 2 KV heads of 16, ffn 48, vocabulary 101."""
    return table_for(
        {
            "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 101, "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu",
            "tie_word_embeddings": tied, "rope_theta": 10000.0,
        }
    )  # fmt: skip


def test_every_linear_belongs_to_one_megatron_linear() -> None:
    assert fused_linears(table()) == {
        "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
        "self_attention.linear_proj": ("o_proj",),
        "mlp.linear_fc1": ("gate_proj", "up_proj"),
        "mlp.linear_fc2": ("down_proj",),
    }


def test_names_and_shapes() -> None:
    settings = PeftSettings(4, 8, ("q_proj", "down_proj"), modules_to_save=("embed_tokens", "lm_head"))
    shapes = promised_shapes(table(tied=True), settings)
    assert shapes["model.layers.1.self_attn.q_proj.lora_A.weight"] == (4, 32)
    assert shapes["model.layers.1.self_attn.q_proj.lora_B.weight"] == (64, 4)
    assert shapes["model.layers.0.mlp.down_proj.lora_A.weight"] == (4, 48)
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (101, 32)
    assert len(shapes) == 2 * 2 * 2 + 2
    assert trained_name(table(tied=True), "lm_head.weight") == "model.embed_tokens.weight"
    assert trained_name(table(), "lm_head.weight") == "lm_head.weight"


def targets(*names: str) -> tuple[str, ...] | str:
    return chosen(table(), rank=4, alpha=8, modules=names).target_modules


def test_targets_expand_in_the_order_of_the_model() -> None:
    assert targets("all-linear") == ALL
    assert targets("down_proj", "q_proj") == ("q_proj", "down_proj")
    assert expand_modules_to_save(table(), ["lm_head"]) == ("lm_head",)
    assert expand_modules_to_save(table(tied=True), ["lm_head"]) == ("embed_tokens", "lm_head")


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("qproj", "q_proj"), ("gate", "gate_proj"), ("all_linear", "all-linear")]
)
def test_unknown_target_names_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"--target_modules {wrong}: .*nearest: {nearest} "):
        targets(wrong)
    assert targets(nearest)


def test_embeddings_are_no_targets() -> None:
    with pytest.raises(ConfigError, match="--modules_to_save lm_head"):
        targets("lm_head")
    assert expand_modules_to_save(table(), ["lm_head"]) == ("lm_head",)


@pytest.mark.parametrize(("rank", "alpha", "flag"), [(0, 8, "--lora_rank 0"), (8, 0, "--lora_alpha 0")])
def test_senseless_sizes(rank: int, alpha: float, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        LoraConfig.for_table(table(), rank=rank, alpha=alpha, target_modules=ALL)


def written(tmp_path: Path, **changes: Any) -> Path:
    """An adapter_config.json as mswift writes it, with changes."""
    (content,) = adapter_files(table(), PeftSettings(4, 8, ALL), (), "base").values()
    (tmp_path / "adapter_config.json").write_text(json.dumps(json.loads(content) | changes))
    return tmp_path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    settings = read_peft_config(written(tmp_path))
    assert (settings.rank, settings.scale_of("x"), settings.target_modules) == (4, 2.0, ALL)
    assert promised_shapes(table(), settings) == promised_shapes(table(), PeftSettings(4, 8, ALL))


@pytest.mark.parametrize(
    ("target", "layers"),
    [
        (["q_proj"], [0, 1]),
        (["model.layers.1.self_attn.q_proj"], [1]),
        (r".*\.layers\.0\..*q_proj", [0]),
        (["proj"], []),
    ],
)
def test_target_modules_mean_what_peft_means(tmp_path: Path, target: Any, layers: list[int]) -> None:
    settings = read_peft_config(written(tmp_path, target_modules=target))
    if not layers:
        with pytest.raises(ConfigError, match="match no linear"):
            promised_shapes(table(), settings)
        return
    names = {f"model.layers.{n}.self_attn.q_proj.lora_{x}.weight" for n in layers for x in "AB"}
    assert promised_shapes(table(), settings).keys() == names


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "all"), ("fan_in_fan_out", True), ("trainable_token_indices", [3]), ("use_qalora", True),
        ("layer_replication", [[0, 1]]), ("init_lora_weights", "pissa"), ("some_later_field", 3), ("peft_type", "IA3"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        read_peft_config(written(tmp_path, **{field: value}))


def test_what_training_lacks_is_read_and_refused_there(tmp_path: Path) -> None:
    settings = read_peft_config(written(tmp_path, lora_bias=True))
    with pytest.raises(ConfigError, match="lora_bias=.*not supported by training"):
        LoraConfig(settings).check("")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", 1), ("rank_pattern", {"q_proj": 0}), ("rank_pattern", ["q_proj"]), ("alpha_pattern", {"(": 8}),
        ("layers_to_transform", ["0"]), ("exclude_modules", "("), ("target_modules", 3), ("lora_alpha", True),
    ],
)  # fmt: skip
def test_senseless_fields_are_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=field):
        read_peft_config(written(tmp_path, **{field: value}))


def test_a_later_field_that_is_off_is_fine(tmp_path: Path) -> None:
    assert read_peft_config(written(tmp_path, some_later_field=None, loftq_config=None)).rank == 4


def test_damaged_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mswift export"):
        read_peft_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config.json"):
        read_peft_config(tmp_path)
    with pytest.raises(CheckpointError, match="no regular expression"):
        read_peft_config(written(tmp_path, target_modules="("))
    with pytest.raises(CheckpointError, match="r=0"):
        read_peft_config(written(tmp_path, r=0))


def test_first_values_are_pinned() -> None:
    """A function of (seed, name) only: these numbers hold on every machine and version."""
    values = kaiming_uniform(42, "model.layers.0.self_attn.q_proj.lora_A.weight", 8, 64)
    assert values.dtype == np.float32
    assert abs(values).max() <= 1 / 8
    assert values.std() == pytest.approx(1 / 8 / np.sqrt(3), rel=0.05)
    np.testing.assert_array_equal(values[0, :3], np.array(PINNED, np.float32))
    assert not np.array_equal(values, kaiming_uniform(43, "model.layers.0.self_attn.q_proj.lora_A.weight", 8, 64))
    assert not np.array_equal(values, kaiming_uniform(42, "model.layers.0.self_attn.k_proj.lora_A.weight", 8, 64))


PINNED = [0.0030471086502075195, 0.010634839534759521, -0.03211396932601929]


def test_tables_and_configuration_need_no_torch() -> None:
    code = (
        "import sys, mswift.converters.adapters, mswift.tuners.peft_config, mswift.tuners.init, mswift.config.merge;"
        "import mswift.tuners.convert, mswift.tuners.verify, mswift.converters.optimizer_state;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_blocks_of_linears_that_hf_fuses() -> None:
    """(start, rows) in the HF linear, in the order of the Megatron weight."""
    blocks = fused_blocks(table_for(family_config("phi3")))
    qkv, up = blocks["self_attention.linear_qkv"], blocks["mlp.linear_fc1"]
    assert [(b.leaf, b.start, b.rows) for b in qkv] == [("qkv_proj", 0, 64), ("qkv_proj", 64, 32), ("qkv_proj", 96, 32)]
    assert [(b.leaf, b.start, b.rows) for b in up] == [("gate_up_proj", 0, 40), ("gate_up_proj", 40, 40)]
    grouped = fused_blocks(table_for(family_config("internlm2")))["self_attention.linear_qkv"]
    assert [(b.leaf, b.start, b.rows) for b in grouped] == [("wqkv", 0, 64)]


def test_two_linears_of_one_leaf_name_are_told_apart() -> None:
    blocks = fused_blocks(table_for(family_config("qwen")))
    assert [blocks[path][0].hf for path in ("self_attention.linear_proj", "mlp.linear_fc2")] == [
        "transformer.h.{l}.attn.c_proj",
        "transformer.h.{l}.mlp.c_proj",
    ]


def test_part_of_a_linear_is_refused() -> None:
    linear = HfLinear("model.layers.0.x_proj", "x_proj", 0, 8, 24)
    check_blocks(linear.name, 24, [Block(linear.name, 0, 16), Block(linear.name, 16, 8)])
    with pytest.raises(ConfigError, match="--target_modules x_proj: .* several Megatron tensors"):
        check_blocks(linear.name, 24, [Block(linear.name, 0, 16)])
