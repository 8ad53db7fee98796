"""What a run left on the disk, in a form that is compared byte for byte."""

from pathlib import Path
from typing import Any

import numpy as np

from mswift import rundir
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Region

TIMED = {"step_seconds", "seconds", "tokens_per_second", "tokens_per_second_per_device", "model_tflops_per_device",
         "memory_bytes", "mfu", "eval_loss", "data_wait"}  # fmt: skip


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint (weights, optimizer), as bytes."""
    source = TorchDistSource(checkpoint)
    result = {}
    for name, info in source.tensors.items():
        size = {"F32": 4, "BF16": 2, "U8": 1}[info.dtype] * int(np.prod(info.shape, dtype=np.int64))
        buffer = bytearray(size)
        source.read(name, Region((0,) * len(info.shape), tuple(info.shape)), memoryview(buffer))
        result[name] = bytes(buffer)
    return result


def log(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rundir.read_metrics(output)]
