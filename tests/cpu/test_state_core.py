"""Moments that megatron-core's own optimizers have saved in the space of the model become Hugging Face names.

A plain megatron-core program with random gradients; its local layer spec, its DDP, its optimizers. Formats that belong
to one layout are refused.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mswift.cli.main import main
from mswift.converters.optimizer_sources import open_states
from mswift.errors import CheckpointError
from tests.cpu.test_convert_megatron import core_model
from tests.support.checkpoints import megatron_tensors, random_model, tiny_config
from tests.support.ranks import leaving_groups, run_ranks

CHANGES = {"num_hidden_layers": 2, "vocab_size": 103}  # padded to 104 at TP2
CASES: dict[str, dict[str, Any]] = {
    "plain": {"layout": {"tp": 2}, "bf16": True},
    "fully_reshardable": {"layout": {}, "bf16": False},
    "fully_reshardable-tp2-bf16": {"layout": {"tp": 2}, "bf16": True, "kind": "fully_reshardable"},
    "dp_reshardable": {"layout": {}, "bf16": False},
    "dp_zero_gather_scatter": {"layout": {}, "bf16": False},
}


@leaving_groups
def core_program(payload: dict[str, Any]) -> dict[str, Any]:
    """Two updates of megatron-core's Adam on this rank, saved; returns whole tensors of rank 0 at TP1."""
    model = core_model(payload["config"], 2, payload["layout"])
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    distributed = payload["kind"] != "plain"
    if payload["bf16"]:
        model.config.bf16, model.config.params_dtype = True, torch.bfloat16
        model = model.bfloat16()
    options = {"use_distributed_optimizer": distributed}
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, **options), model
    )
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-2, bf16=payload["bf16"], params_dtype=model.config.params_dtype, **options
    )
    optimizer = get_megatron_optimizer(settings, [ddp], use_gloo_process_groups=False)
    for step in range(2):
        ddp.zero_grad_buffer()
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator) * (number + 1))
        ddp.finish_grad_sync()
        optimizer.step()
    weights = model.sharded_state_dict()
    more = {"metadata": {"distrib_optim_sharding_type": payload["kind"]}} if distributed else {}
    state = {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=False, **more)}
    if dist.get_rank() == 0:
        Path(payload["dir"]).mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, payload["dir"])
    return {}


def saved(tmp_path: Path, case: str) -> Path:
    """What megatron-core wrote; the model's config.json lies in tmp_path/model."""
    kind = CASES[case].get("kind", case)
    config = tiny_config("qwen3", **CHANGES)
    payload = {"config": config, "dir": str(tmp_path / "core"), "kind": kind, **CASES[case]}
    run_ranks(2, core_program, payload)
    random_model(tmp_path / "model", "qwen3", "BF16" if CASES[case]["bf16"] else "F32", **CHANGES)
    return tmp_path / "core"


@pytest.mark.parametrize("case", ["plain", "fully_reshardable", "fully_reshardable-tp2-bf16"])
def test_moments_in_the_space_of_the_model_are_read(tmp_path: Path, case: str) -> None:
    """Judged by megatron-core's layout written out by hand: HF files, fused by the oracle, are what it saved."""
    core, bf16 = saved(tmp_path, case), CASES[case]["bf16"]
    argv = ["convert", "--model", str(core), "--to", "hf", "--output_dir", str(tmp_path / "hf"), "--optimizer", "true"]
    assert main(argv) == 2
    assert main([*argv, "--model_config", str(tmp_path / "model")]) == 0
    dropped = json.loads((tmp_path / "hf" / "mswift_optimizer.json").read_text())["dropped"]
    assert len(dropped) == (0 if CASES[case]["layout"] == {} else 6)  # of two matrices in three states
    from mswift.converters.io.torch_dist_reader import TorchDistSource
    from mswift.converters.layout import Region

    source = TorchDistSource(core)
    names = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "master": "fp32_param" if case == "plain" else "param"}
    folders = {path.name for path in (tmp_path / "hf" / "optimizer").iterdir() if path.is_dir()}
    assert folders == set(names)
    for state, theirs in names.items():
        own = load_file(tmp_path / "hf" / "optimizer" / state / "model.safetensors")
        fused = megatron_tensors(tiny_config("qwen3", **CHANGES), {n: t.numpy() for n, t in own.items()})
        for key, array in fused.items():
            stored = np.empty(array.shape, np.float32)
            source.read(f"optimizer.state.{theirs}.{key}", Region.full(array.shape), memoryview(stored).cast("B"))
            assert np.array_equal(stored, array), (state, key)
            assert np.abs(stored).max() > 0
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    masters = load_file(tmp_path / "hf" / "optimizer" / "master" / "model.safetensors")
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert all(torch.equal(masters[name].to(dtype), weight) for name, weight in weights.items())
    states = open_states(core, tmp_path / "model")
    assert (states.step, states.run) == (2, None)


@pytest.mark.parametrize("case", ["dp_reshardable", "dp_zero_gather_scatter"])
def test_buffers_of_one_layout_are_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(CheckpointError, match=r"optimizer\.distributed\.dp_group_idx_0.*fully_reshardable"):
        open_states(saved(tmp_path, case), tmp_path / "model")
