"""megatron-core loads what --adapter_layout fused writes, at TP1 and TP2, into the modules Megatron-Bridge makes of it.

Megatron-Bridge itself needs Transformer Engine; its adapter is two of megatron-core's own linears, built here as its
source builds them (linear_in column-parallel over the rank, or row-parallel; linear_out column-parallel).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Region
from tests.cpu.test_adapters_bridge import STACK
from tests.cpu.test_adapters_convert import ALL, convert
from tests.cpu.test_adapters_variants import peft_adapter
from tests.support.adapters import random_model
from tests.support.ranks import join, run_ranks

LAYERS, RANK = 2, 12
MODULES = {  # Megatron module -> (inputs, outputs, row-parallel), of the tiny qwen3
    "self_attention.linear_qkv": (64, 128, False),
    "self_attention.linear_proj": (64, 64, True),
    "mlp.linear_fc1": (64, 192, False),
    "mlp.linear_fc2": (96, 64, True),
}


def load_on_rank(payload: tuple[str, int]) -> dict[tuple[str, int, str], Any]:
    """Local weights by (module, layer, linear) after dist_checkpointing.load."""
    path, tp = payload
    dims, _ = join(tp, tp=tp)
    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mswift.parallel.megatron import world

    world.enter(dims, 1)
    group = parallel_state.get_tensor_model_parallel_group()
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=64, num_attention_heads=4, tensor_model_parallel_size=tp,
        use_cpu_initialization=True, gradient_accumulation_fusion=False,
    )  # fmt: skip
    common: dict[str, Any] = {"config": config, "bias": False, "init_method": torch.nn.init.zeros_, "tp_group": group}
    wanted, linears = {}, {}
    for name, (inputs, outputs, is_row) in MODULES.items():
        for layer in range(LAYERS):
            if is_row:
                low: Any = RowParallelLinear(inputs, RANK, input_is_parallel=True, skip_bias_add=True, **common)
            else:
                low = ColumnParallelLinear(inputs, RANK, gather_output=True, **common)
            high = ColumnParallelLinear(RANK, outputs, gather_output=is_row, **common)
            for part, linear in (("linear_in", low), ("linear_out", high)):
                linears[name, layer, part] = linear
                prefix, offsets = f"decoder.layers.{name}.adapter.{part}.", ((0, layer, LAYERS),)
                entries = linear.sharded_state_dict(prefix, offsets, metadata)
                if part == "linear_out" and name == "mlp.linear_fc1":
                    key = prefix + "weight"
                    entries[key] = apply_swiglu_sharded_factory(entries[key], offsets)
                wanted |= {f"{layer}.{key}": entry for key, entry in entries.items()}
    loaded = dist_checkpointing.load(wanted, path)
    for (name, layer, part), linear in linears.items():
        linear.weight.data.copy_(loaded[f"{layer}.decoder.layers.{name}.adapter.{part}.weight"])
    world.leave()
    return {place: linear.weight.detach().numpy().copy() for place, linear in linears.items()}


def cut(full: np.ndarray[Any, Any], module: str, part: str, tp: int, rank: int) -> np.ndarray[Any, Any]:
    """A rank's part of one layer's tensor, as the modules above hold it."""
    if part == "linear_in" and MODULES[module][2]:
        return np.split(full, tp, axis=1)[rank]
    if part == "linear_out" and module == "mlp.linear_fc1":
        return np.concatenate([np.split(half, tp)[rank] for half in np.split(full, 2)])
    return np.split(full, tp)[rank]


@pytest.mark.parametrize("tp", [1, 2])
def test_megatron_core_loads_fused_adapters(tmp_path: Path, tp: int) -> None:
    random_model(tmp_path / "base", num_hidden_layers=LAYERS, vocab_size=101)
    adapter = peft_adapter(tmp_path / "a", tmp_path / "base", target_modules=ALL)
    convert(adapter, "megatron", tmp_path / "m", *STACK)
    source = TorchDistSource(tmp_path / "m")
    for rank, held in enumerate(run_ranks(tp, load_on_rank, (str(tmp_path / "m"), tp))):
        assert len(held) == 2 * LAYERS * len(MODULES)
        for (module, layer, part), local in held.items():
            key = f"decoder.layers.{module}.adapter.{part}.weight"
            shape = source.tensors[key].shape
            full = np.empty(shape, np.float32)
            source.read(key, Region.full(shape), memoryview(full).cast("B"))
            assert np.abs(local).max() > 0
            assert np.array_equal(local, cut(full[layer], module, part, tp, rank)), (module, layer, part)
