"""An adapter that started as a part of the weight (PiSSA, OLoRA), as the plain LoRA of twice the rank that it is.

What training added to the base is scale * (B @ A - B0 @ A0), A0 and B0 being the start: as one adapter A is [A; A0]
and B is [B, -B0]. PEFT calls this `path_initial_model_for_weight_conversion`. Bytes move and signs change; no torch.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mswift.converters.layout import Region
from mswift.converters.plan import DTYPE_BYTES
from mswift.tuners.arrays import Read
from mswift.tuners.settings import PeftSettings

_A, _B, _START = ".lora_A.weight", ".lora_B.weight", ".start"
_BITS: Mapping[int, Any] = {2: np.uint16, 4: np.uint32}
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def as_plain(settings: PeftSettings, config: bytes) -> tuple[PeftSettings, bytes]:
    """The settings and the adapter_config.json of the plain adapter; the scale stays what it was."""
    alpha = settings.alpha * (math.sqrt(2) if settings.rslora else 2)
    own = replace(settings, rank=2 * settings.rank, alpha=alpha, init="true")
    content = json.loads(config) | {"r": own.rank, "lora_alpha": alpha, "init_lora_weights": True}
    return own, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def joined(tensors: Tensors, read: Read) -> tuple[dict[str, tuple[str, tuple[int, ...]]], Read]:
    """The tensors of the plain adapter, and how their whole rows are read, from those of training."""
    shapes = {}
    for name, (dtype, shape) in tensors.items():
        if name.endswith(_START):
            continue
        if name.endswith(_A):
            shape = (2 * shape[0], shape[1])
        elif name.endswith(_B):
            shape = (shape[0], 2 * shape[1])
        shapes[name] = (dtype, shape)

    def read_joined(name: str, region: Region, out: memoryview) -> None:
        start = name.removesuffix(".weight") + _START
        if name.endswith(_A):
            rank, width = tensors[name][1]
            item = DTYPE_BYTES[tensors[name][0]]
            for own, first in ((name, 0), (start, rank)):
                rows = range(max(region.offsets[0], first), min(region.offsets[0] + region.sizes[0], first + rank))
                if rows:
                    at = (rows.start - region.offsets[0]) * width * item
                    there = Region((rows.start - first, 0), (len(rows), width))
                    read(own, there, out.cast("B")[at : at + len(rows) * width * item])
        elif name.endswith(_B):
            out.cast("B")[:] = _joined_b(tensors, read, name, start, region)
        else:
            read(name, region, out)

    return shapes, read_joined


def _joined_b(tensors: Tensors, read: Read, name: str, start: str, region: Region) -> bytes:
    dtype, (_, rank) = tensors[name]
    parts = []
    for own in (name, start):
        rows = np.empty((region.sizes[0], rank), _BITS[DTYPE_BYTES[dtype]])
        read(own, Region((region.offsets[0], 0), rows.shape), memoryview(rows).cast("B"))
        parts.append(rows)
    parts[1] ^= 1 << (8 * DTYPE_BYTES[dtype] - 1)
    return np.concatenate(parts, axis=1).tobytes()
