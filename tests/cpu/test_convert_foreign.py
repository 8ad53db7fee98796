"""Checkpoints of other programs: megatron-core's own, Megatron-LM's with arguments and optimizer, plain DCP ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from mswift.cli.main import main
from mswift.converters.describe import describe
from mswift.converters.engine import convert, plan
from mswift.converters.reader import WeightReader
from mswift.converters.source import SourceOptions
from mswift.converters.verify import verify
from mswift.errors import CheckpointError
from tests.cpu.test_convert_megatron import LAYOUTS, core_model
from tests.support.checkpoints import megatron_tensors, random_model, read_model, same, tiny_config
from tests.support.ranks import leaving_groups, run_ranks

ARGS = {
    "num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8,
    "ffn_hidden_size": 20, "normalization": "RMSNorm", "norm_epsilon": 1e-6, "rotary_base": 10000, "swiglu": True,
    "untie_embeddings_and_output_weights": True, "padded_vocab_size": 128,
}  # fmt: skip
CHANGES = {"num_hidden_layers": 2, "vocab_size": 103}
PADDED = 128


@leaving_groups
def save_as_megatron_lm(payload: tuple[str, int, dict[str, int], dict[str, Any], str]) -> None:
    """The state that Megatron-LM's save_checkpoint gives to dist_checkpointing: model, optimizer, rng, arguments.

    The weights are those of the converted directory home/m; padding rows are 7.
    """
    home, world_size, layout, args, prefix = payload
    model = core_model(tiny_config("llama", **CHANGES) | {"vocab_size": PADDED}, world_size, layout)
    from argparse import Namespace

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import FP32Optimizer
    from megatron.core.transformer.enums import AttnBackend

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), home + "/m"))
    adam = torch.optim.AdamW([{"params": list(model.parameters()), "wd_mult": 1.0, "lr_mult": 1.0}], lr=1e-3)
    optimizer = FP32Optimizer(adam, OptimizerConfig(optimizer="adam", lr=1e-3), lambda *_: None)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam.step()  # makes the moments; weights are put back
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), home + "/m"))
    rank = torch.distributed.get_rank()
    sharded = model.sharded_state_dict(prefix=prefix)
    state: dict[str, Any] = {
        "args": Namespace(**args, attention_backend=AttnBackend.auto, params_dtype=torch.float32, save=Path("/x")),
        "checkpoint_version": 3.0,
        "iteration": 10,
        "model": sharded,
        "optimizer": optimizer.sharded_state_dict(sharded),
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 10},
        "rng_state": ShardedObject("rng_state", [{"seed": 1}], (world_size,), (rank,)),
    }
    Path(home, "lm", "iter_0000010").mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, home + "/lm/iter_0000010")
    if rank == 0:
        Path(home, "lm", "latest_checkpointed_iteration.txt").write_text("10")


def megatron_lm(home: Path, layout: str = "tp1", prefix: str = "", **args: Any) -> dict[str, np.ndarray]:
    """home/lm as Megatron-LM leaves it, home/hf the model; its tensors."""
    tensors = random_model(home / "hf", "llama", "F32", **CHANGES)
    convert(home / "hf", home / "m", "megatron")
    world_size, degrees = LAYOUTS[layout]
    run_ranks(world_size, save_as_megatron_lm, (str(home), world_size, degrees, ARGS | args, prefix))
    return tensors


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("megatron-lm")
    megatron_lm(path, "tp2")
    return path


def test_a_megatron_lm_checkpoint_becomes_a_model(home: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["convert", "--model", str(home / "lm"), "--to", "hf"]
    assert main([*command, "--output_dir", str(tmp_path / "back"), "--model_config", str(home / "hf")]) == 0
    printed = capsys.readouterr().out
    assert "25 rows that pad the vocabulary of 103" in printed
    assert "state of training (optimizer, random numbers)" in printed
    assert same(read_model(tmp_path / "back"), read_model(home / "hf"))
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (home / "hf" / name).read_bytes()
    options = SourceOptions(model_config=home / "hf" / "config.json")
    convert(home / "lm" / "iter_0000010", tmp_path / "again", "megatron", source_options=options)
    assert verify(tmp_path / "again", home / "hf").equal
    assert verify(home / "lm", home / "hf", options=options).equal


def test_what_is_missing_is_said(home: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--model_config DIR"):
        convert(home / "lm", tmp_path / "out", "hf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 500000.0}, "rotary_base 10000, config.json means 500000.0"),
        ({"rms_norm_eps": 1e-5}, "norm_epsilon 1e-06, config.json means 1e-05"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, "num_attention_heads 4"),
        ({"vocab_size": 200}, r"shape \[128, 24\]; config.json says \[200, 24\]"),
    ],
)
def test_another_models_config_is_refused(changes: dict[str, Any], message: str, home: Path, tmp_path: Path) -> None:
    """Also where all shapes are the same."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_config("llama", **(CHANGES | changes))))
    with pytest.raises(CheckpointError, match=message):
        plan(home / "lm", "hf", SourceOptions(model_config=config))


def test_a_prefix_of_all_keys_is_taken_off(tmp_path: Path) -> None:
    tensors = megatron_lm(tmp_path, "pp2", "module.")
    options = SourceOptions(model_config=tmp_path / "hf")
    convert(tmp_path / "lm", tmp_path / "back", "hf", source_options=options)
    assert same(read_model(tmp_path / "back"), tensors)


def test_a_damaged_tracker_and_the_legacy_format(tmp_path: Path) -> None:
    for text, message in (("ten", "neither an iteration"), ("12", "not a directory"), ("../../x", "neither")):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            plan(tmp_path, "hf")
    (tmp_path / "iter_0000012" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12\n")
    with pytest.raises(CheckpointError, match="mp_rank_00/.*--ckpt-format torch_dist"):
        plan(tmp_path, "hf")


def test_arguments_that_run_code_are_refused(home: Path, tmp_path: Path) -> None:
    import os
    import shutil

    class Attack:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    shutil.copytree(home / "lm" / "iter_0000010", tmp_path / "lm")
    torch.save({"args": Attack()}, tmp_path / "lm" / "common.pt")
    with pytest.raises(CheckpointError, match="refused: it asks for posix.system"):
        plan(tmp_path / "lm", "hf", SourceOptions(model_config=home / "hf"))
    assert not (tmp_path / "ran").exists()


def test_plain_megatron_core_at_any_layout(home: Path) -> None:
    """What dist_checkpointing.save(model.sharded_state_dict()) leaves: no arguments, no state, no hf/."""
    run_ranks(2, save_plain, (str(home), 2, {"pp": 2}))
    options = SourceOptions(model_config=home / "hf")
    assert verify(home / "plain", home / "hf", options=options).equal
    assert "padding" not in describe(plan(home / "plain", "hf", options), 1 << 30)


@leaving_groups
def save_plain(payload: tuple[str, int, dict[str, int]]) -> None:
    path, world_size, layout = payload
    model = core_model(tiny_config("llama", **CHANGES), world_size, layout)
    from megatron.core import dist_checkpointing

    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), path + "/m"))
    Path(path, "plain").mkdir(exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), path + "/plain")


def save_fsdp(payload: tuple[str, dict[str, np.ndarray], str]) -> None:
    """Saves DTensors cut over two ranks by rows, as FSDP2 cuts them."""
    path, tensors, prefix = payload
    from tests.support.ranks import join

    join(2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    state = {
        prefix + name: distribute_tensor(torch.from_numpy(array.view(np.float32)), mesh, [Shard(0)])
        for name, array in tensors.items()
    }
    dcp.save(state | {"optim.state.x": torch.ones(3), "step": 3}, checkpoint_id=path)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_plain_dcp_checkpoint_cut_by_fsdp(prefix: str, tmp_path: Path) -> None:
    tensors = random_model(tmp_path / "hf", "qwen3", "F32", tie_word_embeddings=True)
    run_ranks(2, save_fsdp, (str(tmp_path / "dcp"), tensors, prefix))
    options = SourceOptions(model_config=tmp_path / "hf")
    convert(tmp_path / "dcp", tmp_path / "m", "megatron", source_options=options)
    assert verify(tmp_path / "m", tmp_path / "hf").equal
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "dcp" / name).write_bytes((tmp_path / "hf" / name).read_bytes())
    reader = WeightReader(tmp_path / "dcp")
    expected = megatron_tensors(reader.config, tensors)
    for key, tensor in reader.table.megatron.items():
        for rank in range(2):
            for region in reader.table.shard(key, rank, 2, 1 if tensor.stacked else None):
                data = bytearray(region.num_elements * 4)
                reader.read(key, region, memoryview(data))
                index = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
                assert data == np.ascontiguousarray(expected[key][index]).tobytes()


def test_an_unsharded_dcp_checkpoint_in_another_dtype(tmp_path: Path) -> None:
    tensors = random_model(tmp_path / "hf", "llama", "BF16")
    state = {n: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) for n, a in tensors.items()}
    dcp.save({"app": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    options = SourceOptions(model_config=tmp_path / "hf")
    convert(tmp_path / "dcp", tmp_path / "back", "hf", source_options=options)
    assert same(read_model(tmp_path / "back"), tensors)
