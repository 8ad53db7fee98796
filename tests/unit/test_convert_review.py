"""Faults of whole conversions that no rule shows: files of copies alone, mixed dtypes, parts, links, spellings."""

import errno
import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.converters import engine
from mswift.converters.engine import convert, convert_part, finish_parts
from mswift.converters.execute import recorded_bytes
from mswift.converters.io.partial import Identity, Partial
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


def test_a_copy_is_written_by_the_part_that_has_its_file(tmp_path: Path) -> None:
    tied_with_a_head(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "whole", "hf", max_shard_bytes=13_000)
    inside = json.loads((tmp_path / "whole" / "model.safetensors.index.json").read_text())["weight_map"]
    assert inside["lm_head.weight"] != inside["model.embed_tokens.weight"]
    data = tmp_path / ".cut.mswift-partial" / "data"
    written: set[str] = set()
    for part in range(1, 5):
        convert_part(tmp_path / "hf", tmp_path / "cut", "hf", part, 4, max_shard_bytes=13_000)
        now = {path.name for path in data.glob("*.safetensors") if path.stat().st_blocks}
        for name in now - written:  # a file is whole when its part is done
            assert (data / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        written |= now
    finish_parts(tmp_path / "hf", tmp_path / "cut", "hf", max_shard_bytes=13_000)
    assert verify(tmp_path / "hf", tmp_path / "cut").equal


def test_a_source_that_cannot_be_read_now_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model(tmp_path / "hf")
    right, left = os.preadv, [40]

    def failing(*args: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return right(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(CheckpointError, match=r"cannot be read at byte \d+ \(Input/output error\)"):
            convert(tmp_path / "hf", tmp_path / "out", "megatron")
    assert recorded_bytes(Partial(tmp_path / "out")) > 0
    convert(tmp_path / "hf", tmp_path / "out", "megatron")
    assert verify(tmp_path / "hf", tmp_path / "out").equal


@pytest.mark.parametrize("end", ["publish", "discard", "restart"])
def test_who_clears_between_two_locks_is_not_published(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flock gives a shared lock up before it has the other: what happens between is somebody else's."""
    mine, theirs = Partial(tmp_path / "out"), Partial(tmp_path / "out")
    identity = Identity("plan", 1, "source", "hf")
    mine.begin(identity, 1, restart=False)
    right = fcntl.flock

    def flock(fd: int, kind: int) -> None:
        monkeypatch.setattr(fcntl, "flock", right)
        right(mine._locks["lock"], fcntl.LOCK_UN)
        theirs.begin(identity, 1, restart=True)
        (theirs.data / "theirs").touch()
        right(fd, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    if end == "publish":
        with pytest.raises(ConfigError, match="another process began to write it just now"):
            mine.publish()
    elif end == "discard":
        mine.discard()
    else:
        with pytest.raises(ConfigError, match="another process began to write it just now"):
            mine._enter("part-00001.lock", clear=True)
    assert (theirs.data / "theirs").exists()
    assert not (tmp_path / "out").exists()
    theirs.publish()
    assert (tmp_path / "out" / "theirs").exists()


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
