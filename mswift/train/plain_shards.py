"""Adapters that start as a part of the weight, in training: their boxes as those of the plain LoRA that they are.

As `mswift.tuners.plain` has it for files: A is [A; A0] and B is [B, -B0], A0 and B0 being the start.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from mswift.converters.layout import Region
from mswift.parallel.engine import StateShard

_STARTS = {".lora_A.start": 0, ".lora_B.start": 1}
"""End of a start's name -> the axis on which it lies behind what is trained."""


def plain_shards(shards: Iterable[StateShard]) -> Iterator[StateShard]:
    """The same elements as boxes of [A; A0] and [B, -B0]; what is neither stays as it is."""
    for shard in shards:
        name, _, last = shard.key.rpartition(".")
        axis = _STARTS.get(f".{name.rpartition('.')[2]}.start") if last in ("weight", "start") else None
        if axis is None:
            yield shard
            continue
        rank = shard.shape[axis]
        shape = tuple(2 * size if a == axis else size for a, size in enumerate(shard.shape))
        if last == "weight":
            yield replace(shard, shape=shape)
            continue
        offsets = tuple(o + rank * (a == axis) for a, o in enumerate(shard.region.offsets))
        tensor = shard.tensor if axis == 0 else -shard.tensor
        yield StateShard(f"{name}.weight", shape, Region(offsets, shard.region.sizes), tensor)
