"""`pytorch_model.bin` as torch writes it, and what must not be read: other pickles, damaged files, hostile ones."""

import io
import json
import os
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mswift.converters.engine import convert
from mswift.converters.io.torch_bin import read_bin
from mswift.converters.reader import WeightReader
from mswift.converters.verify import verify
from mswift.errors import CheckpointError, ConfigError
from tests.support.checkpoints import random_model, read_model, same, tiny_config

State = dict[str, torch.Tensor]


def state_of(tensors: dict[str, np.ndarray]) -> State:
    """Bits as BF16 tensors."""
    return {name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) for name, array in tensors.items()}


def as_bin(path: Path, shards: int = 1, change: Callable[[State], Any] = lambda state: state) -> dict[str, np.ndarray]:
    """Writes a random model, then its weights as torch.save does in place of safetensors; returns its tensors."""
    tensors = random_model(path)
    (path / "model.safetensors").unlink()
    state = change(state_of(tensors))
    if shards == 1:
        torch.save(state, path / "pytorch_model.bin")
        return tensors
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = {name: state[name] for name in list(state)[shard::shards]}
        torch.save(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def with_metadata(state: State) -> Any:
    """An OrderedDict with the attribute that nn.Module.state_dict sets."""
    ordered = OrderedDict(state)
    ordered._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return ordered


def parameters(state: State) -> Any:
    return {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}


def one_storage(state: State) -> Any:
    """All tensors are views of one."""
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    parts = flat.split([tensor.numel() for tensor in state.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(state.items(), parts, strict=True)}


def transposed(state: State) -> Any:
    """Stored column after column, and with gaps."""
    result = {name: tensor.t().contiguous().t() for name, tensor in state.items() if tensor.dim() == 2}
    spaced = {name: torch.stack([tensor, tensor], 1)[:, 1] for name, tensor in state.items() if tensor.dim() == 1}
    return {name: (result | spaced)[name] for name in state}


@pytest.mark.parametrize(
    "change", [lambda state: state, with_metadata, parameters, one_storage, transposed], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("shards", [1, 3])
def test_it_is_read_as_torch_reads_it(change: Any, shards: int, tmp_path: Path) -> None:
    tensors = as_bin(tmp_path / "bin", shards, change)
    convert(tmp_path / "bin", tmp_path / "m", "megatron")
    convert(tmp_path / "m", tmp_path / "hf", "hf")
    assert same(read_model(tmp_path / "hf"), tensors)
    assert verify(tmp_path / "bin", tmp_path / "hf").equal
    reader, plain = WeightReader(tmp_path / "bin"), WeightReader(tmp_path / "hf")
    for key in reader.table.megatron:
        for region in reader.table.storage_regions(key):
            a, b = (bytearray(region.num_elements * 2) for _ in range(2))
            reader.read(key, region, memoryview(a))
            plain.read(key, region, memoryview(b))
            assert a == b


def test_a_real_model_saved_by_its_state_dict(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tiny_config("qwen2", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    model.save_pretrained(tmp_path / "safe")
    manifest = convert(tmp_path / "bin", tmp_path / "m", "megatron")
    assert "lm_head.weight" in manifest.dropped  # shares the embedding's storage
    assert verify(tmp_path / "bin", tmp_path / "safe").equal


def test_safetensors_beside_it_are_what_is_read(tmp_path: Path) -> None:
    tensors = random_model(tmp_path / "hf")
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"anything")
    convert(tmp_path / "hf", tmp_path / "out", "hf")
    assert same(read_model(tmp_path / "out"), tensors)


class Attack:
    """A pickle of it calls a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "posix.system"), (eval, "eval"), (torch.hub.load, "torch.hub.load"), (os.getcwd, "getcwd")],
)
def test_a_malicious_pickle_runs_nothing(function: Any, name: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    as_bin(tmp_path / "bin", change=lambda state: {**state, "x": Attack(function, f"touch {marker}")})
    with pytest.raises(CheckpointError, match=f"refused: it asks for .*{name}"):
        WeightReader(tmp_path / "bin")
    assert not marker.exists()


def test_the_format_before_zip_is_refused_with_the_remedy(tmp_path: Path) -> None:
    as_bin(tmp_path / "bin")
    state = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before torch 1.6.*torch.save\(torch.load\('pytorch_model.bin'"):
        WeightReader(tmp_path / "bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "model.norm.weight": s["model.norm.weight"][:1].expand(24)}, "uses elements twice"),
        (lambda s: {**s, "step": 3}, "'step': is a int; a model's file holds tensors only"),
        (lambda s: [1, 2], "holds a list, not a state dict"),
        (lambda s: {**s, 3: s["model.norm.weight"]}, "3 is not the name of a tensor"),
        (lambda s: {**s, "model.norm.weight": s["model.norm.weight"].to_sparse()}, "_rebuild_sparse_tensor"),
        (lambda s: {**s, "model.norm.weight": s["model.norm.weight"].to(torch.float8_e4m3fn)}, "refused"),
        (lambda s: {n: t for n, t in s.items() if "norm" not in n}, "missing"),
    ],
)
def test_what_is_no_model_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    as_bin(tmp_path / "bin", change=change)
    with pytest.raises(CheckpointError, match=message):
        WeightReader(tmp_path / "bin")


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """The zip with other records."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            new = change(name, data)
            if new is not None:
                archive.writestr(name, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, data: None if name.endswith("data/3") else data, "which the file lacks"),
        (lambda name, data: data[:-2] if name.endswith("data/3") else data, "its storage of .* has"),
        (lambda name, data: b"big" if name.endswith("byteorder") else data, "big-endian"),
        (lambda name, data: None if name.endswith("data.pkl") else data, "KeyError"),
        (lambda name, data: pickle.dumps(object) if name.endswith("data.pkl") else data, "builtins.object"),
    ],
)
def test_a_zip_that_lies_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    as_bin(tmp_path / "bin")
    rewritten(tmp_path / "bin" / "pytorch_model.bin", change)
    with pytest.raises(CheckpointError, match=message):
        WeightReader(tmp_path / "bin")


SMALL = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4).bfloat16()[1:3], "c": torch.zeros(0)}


def small_bytes() -> bytes:
    """A small file of torch.save."""
    buffer = io.BytesIO()
    torch.save(SMALL, buffer)
    return buffer.getvalue()


@given(
    changes=st.lists(st.tuples(st.integers(0, 1 << 14), st.integers(0, 255)), max_size=6), end=st.integers(0, 1 << 14)
)
def test_flipped_and_cut_files_are_read_or_refused(
    changes: list[tuple[int, int]], end: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(small_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    path = tmp_path_factory.mktemp("fuzz") / "pytorch_model.bin"
    path.write_bytes(bytes(data[:end] if end < len(data) // 2 else data))
    try:
        tensors = read_bin(path)
    except (CheckpointError, ConfigError):
        return
    for tensor in tensors.values():
        assert 0 <= tensor.offset <= len(data)
        copy = tensor.copy("x")
        assert tensor.nbytes == 0 or copy.hull(1).offsets[0] + copy.hull(1).sizes[0] <= len(data)


def test_the_small_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(small_bytes())
    assert {n: t.shape for n, t in read_bin(tmp_path / "pytorch_model.bin").items()} == {
        "a": (2, 3),
        "b": (2,),
        "c": (0,),
    }


def test_a_pickle_that_asks_for_memory_gets_none(tmp_path: Path) -> None:
    """`r`: store at memo index 2^32 - 1; CPython's unpickler in C would allocate 64 GiB."""
    (tmp_path / "pytorch_model.bin").write_bytes(small_bytes())
    bomb = b"\x80\x02}r\xff\xff\xff\xff."
    rewritten(tmp_path / "pytorch_model.bin", lambda name, data: bomb if name.endswith("data.pkl") else data)
    tracemalloc.start()
    assert read_bin(tmp_path / "pytorch_model.bin") == {}
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
