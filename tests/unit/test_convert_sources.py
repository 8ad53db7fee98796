"""Hugging Face directories in any sharding, and damaged or hostile ones: read right, or refused in words."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.cli.main import main
from mswift.converters.engine import convert, plan
from mswift.converters.io.dcp_metadata import read_metadata
from mswift.converters.io.safetensors import read_header
from mswift.converters.io.stored import read_index
from mswift.converters.reader import WeightReader
from mswift.converters.verify import verify
from mswift.errors import CheckpointError, ConfigError
from tests.support.checkpoints import random_model, read_model, same, tiny_config, write_safetensors

REFUSED = (CheckpointError, ConfigError)
DENSE = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(f"os.{name}", lambda fd: None)


@pytest.mark.parametrize("names", [("a", "b", "c"), ("model-{}-of-00003",) * 3, ("one",)])
def test_shards_without_an_index(names: tuple[str, ...], tmp_path: Path) -> None:
    tensors = random_model(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    for number, name in enumerate(names):
        part = {n: tensors[n] for n in list(tensors)[number :: len(names)]}
        write_safetensors(tmp_path / "hf" / f"{name.format(f'{number + 1:05}')}.safetensors", part)
    convert(tmp_path / "hf", tmp_path / "out", "hf")
    assert same(read_model(tmp_path / "out"), tensors)
    assert verify(tmp_path / "hf", tmp_path / "out").equal


def test_loose_shards_that_are_incomplete_or_repeat_a_tensor(tmp_path: Path) -> None:
    path = tmp_path / "hf"
    tensors = random_model(path, shards=3)
    (path / "model.safetensors.index.json").unlink()
    plan(path, "megatron")
    (path / "model-00002-of-00003.safetensors").rename(path / "x")
    with pytest.raises(CheckpointError, match="1 of 3 shards are missing: model-00002-of-00003.safetensors"):
        plan(path, "megatron")
    (path / "x").rename(path / "model-00002-of-00003.safetensors")
    write_safetensors(path / "other.safetensors", {DENSE: tensors[DENSE]})
    with pytest.raises(CheckpointError, match=f"both model-.* and other.safetensors hold tensor '{DENSE}'"):
        plan(path, "megatron")


def test_header_metadata_of_any_kind_is_no_tensor(tmp_path: Path) -> None:
    tensors = random_model(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"] = {"format": "pt", "note": "x" * 1000, "modelspec.hash": "0x12"}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    convert(tmp_path / "hf", tmp_path / "out", "hf")
    assert same(read_model(tmp_path / "out"), tensors)


OLD_BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
    "model.layers.2.self_attn.rotary_emb.cos_cached": (64, 8),
    "model.layers.2.self_attn.rotary_emb.sin_cached": (64, 8),
    "model.rotary_emb.inv_freq": (4,),
}


def test_buffers_of_old_checkpoints_are_dropped_for_a_reason(tmp_path: Path) -> None:
    tensors = random_model(tmp_path / "hf")
    buffers = {name: np.zeros(shape, np.uint16) for name, shape in OLD_BUFFERS.items()}
    write_safetensors(tmp_path / "hf" / "model.safetensors", tensors | buffers)
    manifest = convert(tmp_path / "hf", tmp_path / "out", "hf")
    assert set(manifest.dropped) == set(OLD_BUFFERS)
    assert all("recomputed" in record.reason for record in manifest.dropped.values())
    assert same(read_model(tmp_path / "out"), tensors)


def test_zero_length_tensors_are_read_and_are_no_part_of_a_model(tmp_path: Path) -> None:
    tensors = random_model(tmp_path / "hf")
    write_safetensors(tmp_path / "hf" / "model.safetensors", tensors | {"empty": np.zeros((0, 3), np.uint16)})
    assert read_header(tmp_path / "hf" / "model.safetensors")["empty"].nbytes == 0
    with pytest.raises(CheckpointError, match=r"1 not in the model \(empty\)"):
        plan(tmp_path / "hf", "megatron")


@pytest.mark.parametrize("target", ["../elsewhere.safetensors", "/etc/hostname", "missing", "loop.safetensors"])
def test_links_out_of_the_directory(target: str, tmp_path: Path) -> None:
    random_model(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    os.symlink(target, tmp_path / "hf" / "loop.safetensors")
    with pytest.raises(CheckpointError):
        plan(tmp_path / "hf", "megatron")


def index_with(path: Path, file: str) -> None:
    """A model whose index places one tensor in that file."""
    random_model(path, shards=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"][DENSE] = file
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "a/b", "", ".", "..", "x\0y", "n" * 300, "\ud800", "model.safetensors/"]
)
def test_an_index_that_leads_elsewhere(file: str, tmp_path: Path, capsys: Any) -> None:
    index_with(tmp_path / "hf", file)
    assert main(["convert", "--model", str(tmp_path / "hf"), "--to", "hf", "--output_dir", str(tmp_path / "x")]) != 0
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "hf/" in err


def model_bytes(tmp: Path) -> tuple[Path, bytes]:
    """A one-layer model and its weights file."""
    random_model(tmp / "hf", num_hidden_layers=1, hidden_size=8, intermediate_size=8, vocab_size=5, head_dim=2)
    file = tmp / "hf" / "model.safetensors"
    return tmp / "hf", file.read_bytes()


HEADER_CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["dtype", "shape", "data_offsets", "remove", "rename", "swap", "extra"]),
        st.integers(0, 20),
        st.one_of(
            st.integers(-5, 1 << 70),
            st.sampled_from(["BF16", "F32", "F8_E4M3", "F4", "", None, True, [], {}, [0], [[0]], 1.5, "\ud800"]),
            st.lists(st.one_of(st.integers(-2, 300), st.just(1 << 63)), max_size=4),
        ),
    ),
    min_size=1,
    max_size=4,
)


def lie(header: dict[str, Any], kind: str, which: int, value: Any) -> None:
    """One change of a header."""
    names = [name for name in header if name != "__metadata__"]
    name = names[which % len(names)] if names else "x"
    if kind == "remove":
        header.pop(name, None)
    elif kind == "rename":
        header[str(value)] = header.pop(name, {})
    elif kind == "swap":
        other = names[(which * 7 + 3) % len(names)] if names else "x"
        header[name], header[other] = header.get(other), header.get(name)
    elif kind == "extra":
        header[str(value)] = {"dtype": "BF16", "shape": [0], "data_offsets": [which, which]}
    elif isinstance(header.get(name), dict):
        header[name] = header[name] | {kind: value}


@given(changes=HEADER_CHANGES)
def test_a_lying_header_is_refused_or_says_the_same(
    changes: list[tuple[str, int, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Read rightly means here: every tensor of the model where it was."""
    path, raw = model_bytes(tmp_path_factory.mktemp("fuzz"))
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    before = {name: tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}
    for change in changes:
        lie(header, *change)
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    try:
        plan(path, "megatron")
    except REFUSED as error:
        str(error).encode()
        return
    now = {name: tuple(e["data_offsets"]) for name, e in header.items() if name in before}
    shapes = {name: tuple(e["shape"]) for name, e in header.items() if name in before}
    true = WeightReader(path).table.hf
    assert sorted(now.values()) == sorted(before.values())  # two tensors of one shape may have changed places
    assert shapes == true


@given(data=st.data())
def test_flipped_and_cut_weights_are_read_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, raw = model_bytes(tmp_path_factory.mktemp("fuzz"))
    size = int.from_bytes(raw[:8], "little")
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(0, 4))):
        changed[data.draw(st.integers(0, 8 + size))] = data.draw(st.integers(0, 255))
    end = data.draw(st.sampled_from([None, None, data.draw(st.integers(0, len(raw)))]))
    (path / "model.safetensors").write_bytes(bytes(changed[:end]))
    try:
        plan(path, "megatron")
    except REFUSED as error:
        str(error).encode()


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=10), inner, max_size=4)),
    max_leaves=12,
)


@given(value=JSON, nested=st.booleans())
def test_any_json_as_an_index(value: Any, nested: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "index.json"
    path.write_text(json.dumps({"weight_map": value} if nested else value))
    try:
        weight_map = read_index(path)
    except REFUSED:
        return
    assert all(isinstance(file, str) for file in weight_map.values())


CONFIG_VALUES = st.one_of(
    JSON,
    st.sampled_from(["silu", "llama", "qwen2", 0, -1, 1 << 70, 1e308, float("inf"), {"rope_type": "yarn"}, [1, 2]]),
)


@given(changes=st.dictionaries(st.sampled_from([*tiny_config(), "rope_scaling", "quantization_config"]), CONFIG_VALUES))
def test_any_values_in_a_config(changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path, _ = model_bytes(tmp_path_factory.mktemp("fuzz"))
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    try:
        plan(path, "megatron")
    except REFUSED as error:
        str(error).encode()


@given(data=st.binary(max_size=300))
def test_any_bytes_as_weights_or_index_or_metadata(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("model.safetensors", "index.json", ".metadata", "config.json"):
        (folder / name).write_bytes(data)
    for read in (
        lambda: read_header(folder / "model.safetensors"),
        lambda: read_index(folder / "index.json"),
        lambda: read_metadata(folder),
        lambda: plan(folder, "hf"),
    ):
        with pytest.raises(REFUSED):
            read()  # type: ignore[no-untyped-call]


@given(data=st.data())
def test_a_mutated_torch_dist_directory_is_read_or_refused(
    data: st.DataObject, torch_dist: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes of .metadata, and of the zip records around the tensors; without the manifest that would show it."""
    folder = tmp_path_factory.mktemp("fuzz")
    for path in torch_dist.iterdir():
        (folder / path.name).hardlink_to(path) if path.is_file() else (folder / path.name).symlink_to(path)
    name = data.draw(st.sampled_from([".metadata", "__0_0.distcp", "common.pt", "metadata.json"]))
    raw = bytearray((torch_dist / name).read_bytes())
    for _ in range(data.draw(st.integers(0, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.sampled_from([None, None, data.draw(st.integers(0, len(raw)))]))
    (folder / name).unlink()
    (folder / name).write_bytes(bytes(raw[:end]))
    tile, block = (memoryview(bytearray(1 << 20)) for _ in range(2))
    try:
        source = plan(folder, "hf").source
        for each in source.order:
            source.stream(each, tile)(0, source.num_bytes(each), block)
        source.close()
    except REFUSED as error:
        str(error).encode()


@pytest.fixture(scope="module")
def torch_dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("torch_dist")
    path, _ = model_bytes(home)
    convert(path, home / "m", "megatron")
    (home / "m" / "mswift_manifest.json").unlink()
    return home / "m"
