"""Damaged and hostile safetensors directories: one error that says file, tensor and numbers, never a traceback."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.converters.engine import convert
from mswift.converters.io.safetensors import read_directory, read_header
from mswift.converters.reader import WeightReader
from mswift.errors import CheckpointError
from tests.support.checkpoints import random_model, random_tensors, tiny_config, write_model, write_safetensors

NAME = "model.layers.1.mlp.up_proj.weight"


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: Any = (4,), dtype: Any = "BF16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes"),
    "shorter than its header": (file_of({})[:9], "announces a header of 2 bytes, but the file has 9"),
    "huge header": ((1 << 63).to_bytes(8, "little") + b"{}", "announces a header of 9223372036854775808"),
    "not JSON": (file_of(b"{nonsense"), "not valid JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not valid JSON"),
    "deep JSON": (file_of(b"[" * 100000), "not valid JSON"),
    "a list": (file_of([]), "JSON list"),
    "duplicate": (file_of(b'{"a":1,"a":2}'), "'a' is named twice"),
    "not an entry": (file_of({"a": 3}), "tensor 'a'"),
    "surplus field": (file_of({"a": entry(0, 8) | {"x": 1}}, bytes(8)), "tensor 'a'"),
    "unknown dtype": (file_of({"a": entry(0, 8, dtype="F7")}, bytes(8)), "unknown dtype 'F7'"),
    "dtype a list": (file_of({"a": entry(0, 8, dtype=[])}, bytes(8)), "unknown dtype"),
    "negative shape": (file_of({"a": entry(0, 8, (-4,))}, bytes(8)), "are not sizes"),
    "true as a size": (file_of({"a": entry(0, 2, (True,))}, bytes(2)), "are not sizes"),
    "too large a shape": (file_of({"a": entry(0, 8, (1 << 40, 1 << 40))}, bytes(8)), "but data_offsets [0, 8] hold 8"),
    "lying shape": (file_of({"a": entry(0, 8, (5,))}, bytes(8)), "BF16 [5] needs 10 bytes, but data_offsets [0, 8]"),
    "overlap": (file_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "tensor 'b' begins at byte"),
    "gap": (file_of({"a": entry(0, 8), "b": entry(10, 18)}, bytes(18)), "leaves a gap"),
    "truncated": (file_of({"a": entry(0, 8)}, bytes(7)), "it is truncated"),
    "surplus bytes": (file_of({"a": entry(0, 8)}, bytes(9)), "bytes that no tensor owns"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_lying_headers(case: str, tmp_path: Path) -> None:
    content, message = HEADERS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_right_headers_are_read(tmp_path: Path) -> None:
    """Zero-length tensors, scalars, reordered entries and padding are legal."""
    path = tmp_path / "model.safetensors"
    header = {"b": entry(8, 16), "z": entry(8, 8, (0, 3)), "a": entry(0, 8), "s": entry(16, 18, ())}
    path.write_bytes(file_of(json.dumps(header).encode() + b"   ", bytes(18)))
    assert {n: t.shape for n, t in read_header(path).items()} == {"b": (4,), "z": (0, 3), "a": (4,), "s": ()}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)
SIZE = st.integers(-2, 40) | st.integers(-(2**70), 2**70)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["BF16", "F32", "BOOL", "F7"]) | JSON,
        "shape": st.lists(SIZE, max_size=3) | JSON,
        "data_offsets": st.lists(SIZE, min_size=2, max_size=2) | JSON,
    }
)


@given(
    header=st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=4) | JSON,
    data=st.binary(max_size=64),
    cut=st.integers(0, 200),
    flip=st.integers(0, 2**20),
)
def test_any_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes, cut: int, flip: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    content = bytearray(file_of(header, data))
    if flip % 3 == 0:
        content[flip % len(content)] ^= 1 << flip % 8
    path.write_bytes(content[: len(content) - cut] if flip % 2 else content)
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    assert sum(t.nbytes for t in tensors.values()) <= path.stat().st_size


def change_index(path: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = path / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    change(value["weight_map"])
    index.write_text(json.dumps(value))


INDEXES: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "a missing file": (lambda m: m.update({NAME: "model-9.safetensors"}), "names model-9.safetensors, "),
    "another file": (lambda m: m.update({NAME: min({*m.values()} - {m[NAME]})}), "which the index places in"),
    "a tensor nowhere": (lambda m: m.update({"extra": m[NAME]}), "lacks tensor 'extra'"),
    "a tensor unlisted": (lambda m: m.pop(NAME), f"holds tensor '{NAME}', which the index places in no file"),
    "a path upwards": (lambda m: m.update({NAME: "../x.safetensors"}), "'../x.safetensors' is not a plain file name"),
    "an absolute path": (lambda m: m.update({NAME: "/etc/passwd"}), "'/etc/passwd' is not a plain file name"),
    "no text": (lambda m: m.update({NAME: 3}), "has no weight_map"),
}  # fmt: skip


@pytest.mark.parametrize("case", INDEXES)
def test_wrong_indexes(case: str, tmp_path: Path) -> None:
    change, message = INDEXES[case]
    path = tmp_path / "hf"
    random_model(path, shards=3)
    WeightReader(path)
    change_index(path, change)
    with pytest.raises(CheckpointError) as caught:
        read_directory(path)
    assert message in str(caught.value)


def test_links_out_of_the_directory_are_refused_and_hub_caches_are_not(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1", tmp_path / "models--x" / "blobs"
    random_model(snapshot)
    file = snapshot / "model.safetensors"
    blobs.mkdir()
    file.rename(blobs / "abc")
    file.symlink_to("../../blobs/abc")
    WeightReader(snapshot)
    (blobs / "abc").rename(tmp_path / "outside")
    file.unlink()
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="is a link to .*outside"):
        WeightReader(snapshot)


def test_both_or_neither_weights(tmp_path: Path) -> None:
    path = tmp_path / "hf"
    random_model(path, shards=2)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has both"):
        WeightReader(path)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        WeightReader(path)


def test_an_unreadable_index(tmp_path: Path) -> None:
    random_model(tmp_path / "hf", shards=2)
    (tmp_path / "hf" / "model.safetensors.index.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        WeightReader(tmp_path / "hf")


MODELS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda t: t.pop(NAME), f"1 missing ({NAME})"),
    "extra": (lambda t: t.update({"model.extra": t[NAME]}), "1 not in the model (model.extra)"),
    "wrong shape": (lambda t: t.update({NAME: t[NAME][:-1].copy()}), "has shape [19, 24]; config.json says [20, 24]"),
    "transposed": (lambda t: t.update({NAME: t[NAME].T.copy()}), "has shape [24, 20]; config.json says [20, 24]"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_tensors_that_the_config_does_not_describe(case: str, tmp_path: Path) -> None:
    change, message = MODELS[case]
    config = tiny_config()
    tensors = random_tensors(config)
    change(tensors)
    write_model(tmp_path / "hf", config, tensors)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "hf", tmp_path / "out", "megatron")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "message"), [("F32", "one dtype is expected"), ("I32", "weights must be one of")])
def test_other_dtypes(dtype: str, message: str, tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    path = write_model(tmp_path / "hf", config, tensors)
    (path / "model.safetensors").unlink()
    names = list(tensors)
    write_safetensors(path / "a.safetensors", {n: tensors[n] for n in names if n != NAME})
    write_safetensors(path / "b.safetensors", {NAME: np.zeros(tensors[NAME].shape, "<u4")}, dtype)
    weight_map = {n: "b.safetensors" if n == NAME else "a.safetensors" for n in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError) as caught:
        WeightReader(path)
    assert message in str(caught.value)
    assert NAME in str(caught.value)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    random_model(tmp_path / "hf")
    os.unlink(tmp_path / "hf" / "model.safetensors")
    os.mkdir(tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        WeightReader(tmp_path / "hf")
