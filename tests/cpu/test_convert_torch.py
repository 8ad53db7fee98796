"""Conversions judged by transformers, safetensors and torch: published weights, models that transformers wrote,
torch's own readers and writers of distributed checkpoints.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from mswift.cli.main import main
from mswift.converters.catalog import read_config
from mswift.converters.engine import convert
from mswift.converters.io.dcp_metadata import read_metadata
from mswift.converters.io.pickle_writer import TORCH_DTYPES
from mswift.converters.io.torch_dist import ShardWriter, write_index
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.io.torch_item import STORAGES, tensor_envelope
from mswift.converters.layout import Region
from mswift.converters.plan import table_for
from mswift.converters.verify import verify
from tests.support.checkpoints import hf_shapes, megatron_tensors, read_region, tiny_config
from tests.support.shared import shared_file

SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def load_directory(path: Path) -> dict[str, Tensor]:
    """All tensors of all safetensors files."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", ["stories260K-hf", "stories260K-hd32-hf"])
def test_published_weights_there_and_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the commands that a user types: every tensor and every other file, bit for bit."""
    source, there, back = str(shared_file(f"data/weights/{name}")), str(tmp_path / "m"), str(tmp_path / "back")
    assert main(["convert", "--model", source, "--to", "megatron", "--output_dir", there]) == 0
    assert main(["convert", "--model", there, "--to", "hf", "--output_dir", back]) == 0
    assert main(["verify", source, back]) == 0
    assert main(["verify", there]) == 0
    assert main(["convert", "--model", source, "--to", "megatron", "--output_dir", there]) == 2
    assert "exists already" in capsys.readouterr().err
    assert same(load_directory(Path(back)), load_directory(Path(source)))
    for file in SIDE_FILES:
        assert (Path(back) / file).read_bytes() == (Path(source) / file).read_bytes()


FIELDS: dict[str, Any] = {
    "vocab_size": 1003, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    },
    "llama-3.1": {"model_type": "llama", "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 20},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_transformers_wrote(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Sharded files and config.json of transformers 5; afterwards transformers computes the same logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**FIELDS | MODELS[name])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    convert(tmp_path / "m", tmp_path / "back", "hf", max_shard_bytes=50_000)
    assert same(load_directory(tmp_path / "back"), load_directory(tmp_path / "hf"))
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=dtype, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(12)[None] * 83 % 1003
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", MODELS)
def test_the_hand_written_shapes_are_those_of_transformers(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = tiny_config(**{k: v for k, v in MODELS[name].items() if "rope" not in k})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    if fields["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    assert shapes == hf_shapes(fields)


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (1, 300, 4), (2, 70000), (2, 1, 3, 4)])
def test_torch_load_reads_our_envelope(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    prefix, suffix = tensor_envelope(dtype, shape)
    expected = torch.randint(0, 2, shape).to(getattr(torch, TORCH_DTYPES[dtype]))
    data = (
        bytes(expected.reshape(-1).view(torch.uint8).numpy())
        if shape
        else bytes(expected.view(1).view(torch.uint8).numpy())
    )
    (tmp_path / "item").write_bytes(prefix + data + suffix)
    found = torch.load(tmp_path / "item", weights_only=True)
    assert found.dtype == expected.dtype
    assert found.is_contiguous()
    assert torch.equal(found, expected)


def stories(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    source = shared_file("data/weights/stories260K-hf")
    convert(source, tmp_path / "m", "megatron")
    tensors = {n: t.numpy() for n, t in load_directory(source).items()}
    return tmp_path / "m", megatron_tensors(read_config(source), tensors)


def test_torch_reads_what_we_wrote(tmp_path: Path) -> None:
    path, expected = stories(tmp_path)
    state = {key: torch.full(array.shape, float("nan")) for key, array in expected.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert all(np.array_equal(state[key].numpy(), expected[key]) for key in expected)
    assert torch.load(path / "common.pt", weights_only=True) == {}


def test_our_metadata_equals_torchs(tmp_path: Path) -> None:
    """Unpickled by torch, object by object: as torch itself would describe one-chunk tensors."""
    state = {"a.weight": torch.randn(3, 4), "b": torch.ones(7, dtype=torch.bfloat16)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "theirs"), no_dist=True)
    (tmp_path / "ours").mkdir()
    writer = ShardWriter(tmp_path / "ours", "__0_0.distcp")
    for name, tensor in state.items():
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
        data = memoryview(bytes(tensor.view(torch.uint8).numpy()))
        writer.add(name, dtype, tuple(tensor.shape), Region.full(tensor.shape), data)
    write_index(tmp_path / "ours", [writer.close()])
    ours, theirs = (dcp.FileSystemReader(tmp_path / n).read_metadata() for n in ("ours", "theirs"))
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data.keys() == theirs.storage_data.keys()


def test_we_read_what_torch_wrote(tmp_path: Path) -> None:
    state = {
        "weight": torch.randn(6, 5), "half": torch.randn(3, 2).bfloat16(), "part": torch.randn(9, 4)[::2, 1:3],
        "object": {"x": [1, 2]}, "bytes": torch.arange(5, dtype=torch.uint8),
    }  # fmt: skip
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "c"), no_dist=True)
    source = TorchDistSource(tmp_path / "c")
    assert set(read_metadata(tmp_path / "c").objects) & {"object", "object.x.0", "object.x"}
    for name in ("weight", "half", "part", "bytes"):
        tensor = state[name].contiguous()
        item = np.dtype(f"<u{tensor.element_size()}")
        for region in (Region.full(tensor.shape), Region((1,) * tensor.dim(), (1,) * tensor.dim())):
            index = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
            found = read_region(source, name, region, item)
            assert found.tobytes() == tensor[index].contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_of_several_ranks_are_one_checkpoint_for_torch(ranks: int, tmp_path: Path) -> None:
    """Each rank writes its tensor-parallel regions; torch assembles what the oracle says."""
    source = shared_file("data/weights/stories260K-hf")
    config = read_config(source)
    table, expected = (
        table_for(config),
        megatron_tensors(config, {n: t.numpy() for n, t in load_directory(source).items()}),
    )
    (tmp_path / "c").mkdir()
    files = []
    for rank in range(ranks):
        writer = ShardWriter(tmp_path / "c", f"__{rank}_0.distcp")
        for key, tensor in table.megatron.items():
            if tensor.rule.cut is None and rank:
                continue
            for layer in range(5) if tensor.stacked else (None,):
                for region in table.shard(key, rank, ranks, layer):
                    index = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
                    data = np.ascontiguousarray(expected[key][index]).data
                    writer.add(key, "F32", tensor.shape, region, data)
        files.append(writer.close())
    write_index(tmp_path / "c", files)
    state = {key: torch.full(array.shape, float("nan")) for key, array in expected.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "c"), no_dist=True)
    assert all(np.array_equal(state[key].numpy(), expected[key]) for key in expected)
    (tmp_path / "c" / "hf").mkdir()
    (tmp_path / "c" / "hf" / "config.json").write_text(json.dumps(config))
    assert verify(tmp_path / "c", source).equal
