"""Checkpoints of any size as sparse files: true headers, no data."""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from mswift.converters.plan import DTYPE_BYTES

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (safetensors' name of the dtype, shape)."""


def write_sparse_model(path: Path, config: Mapping[str, Any], tensors: Tensors, max_shard_bytes: int) -> int:
    """A model directory whose shards hold headers and holes; returns the number of shards."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    shards = list(_shards(tensors, max_shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):06}.safetensors"
        write_sparse_file(path / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    total = sum(prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return len(shards)


def write_sparse_file(path: Path, tensors: Tensors) -> None:
    """One safetensors file with a hole where its data would be."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


def _shards(tensors: Tensors, max_shard_bytes: int) -> Iterable[list[str]]:
    names: list[str] = []
    used = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * DTYPE_BYTES[dtype]
        if names and used + size > max_shard_bytes:
            yield names
            names, used = [], 0
        names.append(name)
        used += size
    yield names
