"""Optimizer state and adapters of every family in the catalog: there and back, bit for bit, from files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mswift.converters.adapters import linears
from mswift.converters.arrays import Arrays, to_megatron
from mswift.converters.catalog import family_names
from mswift.converters.engine import convert
from mswift.converters.io.dcp_metadata import read_metadata
from mswift.converters.io.safetensors import read_header
from mswift.converters.io.torch_dist import ShardWriter, rewrite_index
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Region
from mswift.converters.optimizer_state import convert_with_optimizer
from mswift.converters.plan import ModelTable, table_for
from mswift.tuners.convert import convert_adapter, open_adapter
from mswift.tuners.peft_config import CONFIG_FILE, PREFIX, WEIGHTS_FILE, adapter_files, read_peft_config
from mswift.tuners.settings import PeftSettings
from mswift.tuners.shapes import promised_shapes
from mswift.tuners.verify import verify_adapters
from tests.support.checkpoints import write_model, write_safetensors
from tests.support.family_configs import family_config


def bits(shapes: dict[str, tuple[int, ...]], seed: int) -> Arrays:
    """Random 32-bit words, NaNs included."""
    generator = np.random.default_rng(seed)
    return {n: generator.integers(0, 2**32, shape, np.uint32, endpoint=False) for n, shape in shapes.items()}


def stored(path: Path) -> Arrays:
    """Tensors of a safetensors file as bits."""
    raw = path.read_bytes()
    return {
        n: np.frombuffer(raw[t.offset : t.offset + t.nbytes], np.uint32).reshape(t.shape)
        for n, t in read_header(path).items()
    }


def same(a: Arrays, b: Arrays) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


KINDS = ("deepseek_v3", "gemma2", "gpt_oss", "nemotron_h", "phi3", "qwen2_moe", "qwen3_moe", "qwen3_next")
"""Families that have every kind of rule between them; that the table moves others, test_every_family proves."""


@pytest.mark.parametrize("family", KINDS)
def test_optimizer_state_moves(family: str, tmp_path: Path) -> None:
    config = family_config(family)
    table = table_for(config)
    write_model(tmp_path / "model", config, bits(dict(table.hf), 0), "F32")
    convert(tmp_path / "model", tmp_path / "m", "megatron")
    states = {state: bits(dict(table.hf), seed) for seed, state in enumerate(("exp_avg",), 1)}
    writer = ShardWriter(tmp_path / "m", "__states_0.distcp")
    for state, arrays in states.items():
        for key, array in to_megatron(arrays, table).items():
            writer.add(f"optimizer.{state}.{key}", "F32", array.shape, Region.full(array.shape), memoryview(array))
    rewrite_index(tmp_path / "m", read_metadata(tmp_path / "m"), [writer.close()])
    convert_with_optimizer(tmp_path / "m", tmp_path / "hf", "hf", lambda to: convert(tmp_path / "m", to, "hf"))
    for state, arrays in states.items():
        assert same(stored(tmp_path / "hf" / "optimizer" / state / "model.safetensors"), arrays)
    back = tmp_path / "back"
    convert_with_optimizer(tmp_path / "hf", back, "megatron", lambda to: convert(tmp_path / "hf", to, "megatron"))
    one, other = (contents(TorchDistSource(path)) for path in (tmp_path / "m", back))
    assert same(one, other)
    assert len(one) == 2 * len(table.megatron)


def contents(source: TorchDistSource) -> Arrays:
    out: Arrays = {}
    for name, info in source.tensors.items():
        out[name] = np.empty(info.shape, np.uint32)
        source.read(name, Region.full(info.shape), memoryview(out[name].reshape(-1)).cast("B"))
    return out


def adapter_of(path: Path, base: Path, table: ModelTable, **changes: Any) -> Path:
    """A PEFT directory with a LoRA of rank 3 on every linear for which Megatron-Bridge has a place."""
    elsewhere = (".mixer.", "linear_attn", "shared_expert_gate")
    modules = [linear.name for linear in linears(table) if not any(word in linear.name for word in elsewhere)]
    path.mkdir()
    (content,) = adapter_files(
        table, PeftSettings(rank=3, alpha=7.5, target_modules=tuple(modules)), (), str(base)
    ).values()
    (path / CONFIG_FILE).write_bytes(content)
    shapes = promised_shapes(table, read_peft_config(path))
    write_safetensors(path / WEIGHTS_FILE, {PREFIX + n: a for n, a in bits(shapes, 3).items()}, "F32")
    return path


@pytest.mark.parametrize("family", [name for name in family_names() if name not in ("mamba2", "nemotron_h")])
def test_adapters_are_fused_and_split(family: str, tmp_path: Path) -> None:
    config = family_config(family)
    table = table_for(config)
    write_model(tmp_path / "model", config, bits({"x": (1,)}, 0), "F32")
    adapter = adapter_of(tmp_path / "a", tmp_path / "model", table)
    for name, layout, fuse in (("plain", "mswift", "equal"), ("stacked", "fused", "stack")):
        target: Any = layout
        convert_adapter(open_adapter(adapter, None), tmp_path / name, "megatron", layout=target, fuse=fuse)  # type: ignore[arg-type]
        convert_adapter(open_adapter(tmp_path / name, None), tmp_path / f"{name}-back", "hf")
        assert same(stored(tmp_path / f"{name}-back" / WEIGHTS_FILE), stored(adapter / WEIGHTS_FILE))
        assert (tmp_path / f"{name}-back" / CONFIG_FILE).read_bytes() == (adapter / CONFIG_FILE).read_bytes()
        assert verify_adapters(adapter, tmp_path / name, None).equal
