"""What the steps of one rank share: the parts of a run once they are built."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from mswift.config.train import TrainConfig
from mswift.converters.reader import WeightReader
from mswift.data.packed import Stored
from mswift.data.stream import StreamDataset
from mswift.parallel.engine import Engine
from mswift.topology import ParallelDims
from mswift.train.batches import BatchPlan
from mswift.train.hang import HangWatch


@dataclass
class Run:
    """One rank of a run. `base`: fingerprint of the model that the run was started from; on rank 0."""

    config: TrainConfig
    rank: int
    dims: ParallelDims
    device: torch.device
    reader: WeightReader
    engine: Engine
    plan: BatchPlan
    data: Stored | StreamDataset
    val_data: Stored | None
    last_step: int
    output_dir: Path
    hf_files: dict[str, bytes]
    watch: HangWatch
    base: dict[str, str] = field(default_factory=dict)
    skipped_steps: int = 0
