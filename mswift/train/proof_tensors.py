"""What a proof of a layout starts from and compares: random tensors by name, and whole tensors out of shards."""

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mswift.converters.arrays import Arrays
from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable
from mswift.errors import LayoutError
from mswift.parallel.engine import StateShard

Gathered = dict[str, tuple[tuple[int, ...], list[tuple[Region, Tensor]]]]
"""Key -> (global shape, [(region, its values)]) of one rank; it pickles."""


class RandomWeights:
    """A `WeightReader` over random fp32 weights, each drawn from the seed and its own key."""

    dtype = "F32"
    hf_files = Path("random weights")

    def __init__(self, table: ModelTable, seed: int) -> None:
        self.table, self._seed = table, seed
        self._arrays: Arrays = {}

    def dtype_of(self, _key: str) -> str:
        """Dtype of one Megatron tensor."""
        return self.dtype

    def read(self, key: str, region: Region, out: memoryview) -> None:
        """Bytes of a region, C order."""
        if key not in self._arrays:
            self._arrays[key] = _random(key, self.table.megatron[key].shape, self._seed)
        out[:] = np.ascontiguousarray(self._arrays[key][_box(region)]).tobytes()


class RandomAdapter:
    """An `AdapterSource` with random A and B, so that neither gradient is zero; small beside the base weights."""

    def __init__(self, seed: int) -> None:
        self._seed, self._shapes = seed, {}  # type: tuple[int, dict[str, tuple[int, ...]]]

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Take note of the adapter's tensors."""
        self._shapes = shapes

    def read(self, name: str, region: Region) -> Tensor:
        """A region of one tensor."""
        values = np.float32(0.2) * _random(name, self._shapes[name], self._seed)
        return torch.from_numpy(values[_box(region)])


def _random(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    """Norms lie around 1, all else is small: the larger the weights, the higher the noise floor of the gradients."""
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight") or "layer_norm_weight" in name:
        return 1 + np.float32(0.2) * values
    is_matrix = len(shape) > 1 and not name.endswith(("bias", "norm_weight"))
    return values * np.float32(0.5 * shape[-1] ** -0.5 if is_matrix else 0.2)


def gather(shards: Iterable[StateShard]) -> Gathered:
    """The shards of one rank by key."""
    out: Gathered = {}
    for shard in shards:
        out.setdefault(shard.key, (shard.shape, []))[1].append((shard.region, shard.tensor.detach().cpu().clone()))
    return out


def assemble(ranks: Iterable[Mapping[str, Any]]) -> Arrays:
    """Global tensors from what all ranks gathered. LayoutError unless they tile every tensor exactly once."""
    counts: Arrays = {}
    out: Arrays = {}
    for rank in ranks:
        for key, (shape, parts) in rank.items():
            for region, values in parts:
                if key not in out:
                    out[key] = np.zeros(shape, values.float().numpy().dtype)
                    counts[key] = np.zeros(shape, np.int32)
                out[key][_box(region)] = values.float().numpy().reshape(region.sizes)
                counts[key][_box(region)] += 1
    for key, count in counts.items():
        if not count.min() == count.max() == 1:
            raise LayoutError(f"{key}: written {count.min()} to {count.max()} times by the ranks of this layout")
    return out


def _box(region: Region) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
