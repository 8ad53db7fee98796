"""Faults of whole conversions that no rule shows: files of copies alone, mixed dtypes, parts, links, spellings."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.converters import engine
from mswift.converters.engine import convert, convert_part, finish_parts
from mswift.converters.io.safetensors import encode_header
from mswift.converters.plan import table_for
from mswift.converters.verify import verify
from mswift.converters.work import Unit, part_of
from mswift.errors import CheckpointError, ConfigError
from tests.support.checkpoints import random_model, random_tensors, tiny_config, write_model
from tests.support.family_configs import family_config


def tied_with_a_head(path: Path, equal: bool = True) -> None:
    config = tiny_config("llama", tie_word_embeddings=True)
    tensors = random_tensors(config, "BF16")
    head = tensors["model.embed_tokens.weight"] if equal else tensors["model.embed_tokens.weight"] + 1
    write_model(path, config, tensors | {"lm_head.weight": head}, "BF16")


@pytest.mark.parametrize("shard_bytes", [3_000, 7_000, 11_000, 13_000])
def test_a_file_that_holds_copies_alone_is_written(shard_bytes: int, tmp_path: Path) -> None:
    tied_with_a_head(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "again", "hf", max_shard_bytes=shard_bytes)
    assert verify(tmp_path / "hf", tmp_path / "again").equal
    convert(tmp_path / "again", tmp_path / "meg", "megatron")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 6))
def test_every_unit_belongs_to_one_part(sizes: list[int], parts: int) -> None:
    units = [Unit(str(n), 0, size, f"file{n}") for n, size in enumerate(sizes)]
    shared = [unit for part in range(1, parts + 1) for unit in part_of(units, part, parts)]
    assert sorted(unit.name for unit in shared) == sorted(unit.name for unit in units)


def test_finish_compares_the_head_and_looks_at_the_files(tmp_path: Path) -> None:
    tied_with_a_head(tmp_path / "other", equal=False)
    for part in (2, 3, 4):
        convert_part(tmp_path / "other", tmp_path / "out", "megatron", part, 4)
    with pytest.raises(CheckpointError):
        finish_parts(tmp_path / "other", tmp_path / "out", "megatron")
    random_model(tmp_path / "hf")
    for part in (1, 2):
        convert_part(tmp_path / "hf", tmp_path / "cut", "hf", part, 2, max_shard_bytes=20_000)
    shard = next((tmp_path / ".cut.mswift-partial").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is not what was written"):
        finish_parts(tmp_path / "hf", tmp_path / "cut", "hf", max_shard_bytes=20_000)


def test_a_source_that_changes_meanwhile_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model(tmp_path / "hf")
    right = engine.finish

    def late(*args: Any) -> Any:
        (tmp_path / "hf" / "model.safetensors").touch()
        return right(*args)

    monkeypatch.setattr(engine, "finish", late)
    with pytest.raises(CheckpointError, match="was changed while it was converted"):
        convert(tmp_path / "hf", tmp_path / "out", "megatron")
    assert not (tmp_path / "out").exists()


def test_one_megatron_tensor_has_one_dtype(tmp_path: Path) -> None:
    config = family_config("glm4_moe", first_k_dense_replace=0, num_nextn_predict_layers=0)
    table, biases = table_for(config), 0
    dtypes = {}
    for name in table.hf:
        biases += name.endswith("e_score_correction_bias")
        dtypes[name] = "F32" if name.endswith("e_score_correction_bias") and biases == 1 else "BF16"
    header, _ = encode_header({name: (dtypes[name], shape) for name, shape in table.hf.items()})
    size = sum(math.prod(s) * (4 if dtypes[n] == "F32" else 2) for n, s in table.hf.items())
    tmp_path.joinpath("config.json").write_text(json.dumps(config))
    tmp_path.joinpath("model.safetensors").write_bytes(header + np.zeros(size, np.uint8).tobytes())
    with pytest.raises(CheckpointError, match=r"e_score_correction_bias is BF16, but .* is F32"):
        engine.plan(tmp_path, "megatron")


def test_a_link_that_leads_out_is_not_carried(tmp_path: Path) -> None:
    random_model(tmp_path / "hf")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "hf" / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(CheckpointError, match=r"notes.txt: is a link to .*secret.txt, outside"):
        convert(tmp_path / "hf", tmp_path / "out", "megatron")
    assert not (tmp_path / "out").exists()


def test_rope_in_two_spellings_must_agree() -> None:
    linear = {"rope_type": "linear", "factor": 4.0}
    both = tiny_config() | {"rope_parameters": linear | {"rope_theta": 10000.0}, "rope_scaling": linear}
    assert table_for(both).spec.rope.factor == 4.0
    with pytest.raises(ConfigError, match="'rope_scaling' and 'rope_parameters' differ"):
        table_for(both | {"rope_scaling": linear | {"factor": 2.0}})
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="'original_max_position_embeddings' is 32, but rope_scaling has 16"):
        table_for(tiny_config() | {"rope_scaling": llama3, "original_max_position_embeddings": 32})


def test_a_field_that_the_model_depends_on_cannot_be_ignored(tmp_path: Path) -> None:
    random_model(tmp_path / "hf")
    with pytest.raises(ConfigError, match="--ignore_config_fields rms_norm_eps: the model depends on it"):
        engine.plan(tmp_path / "hf", "megatron", engine.SourceOptions(ignored=("rms_norm_eps",)))
