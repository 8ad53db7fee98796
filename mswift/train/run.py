"""The commands `mswift pt` and `mswift sft`: plan only, or train in this process as one rank of a job.

Everything that can be refused without torch is refused before torch is imported.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mswift.config.loader import to_arguments
from mswift.config.train import PtConfig, SftConfig, TrainConfig
from mswift.converters.reader import WeightReader
from mswift.launchers import local
from mswift.launchers.environment import RankInfo, current
from mswift.launchers.job import mswift_job
from mswift.launchers.preflight import noting_refusals
from mswift.refusals import check_train
from mswift.refusals.backend import with_shared_sequences
from mswift.startup import importing
from mswift.topology import ParallelDims
from mswift.train.inputs import input_refusals, open_model
from mswift.train.resume import ResumePoint, start_of

Kind = Literal["pt", "sft"]


@dataclass(frozen=True)
class Start:
    """What is known before anything heavy is imported."""

    kind: Kind
    config: TrainConfig
    info: RankInfo
    dims: ParallelDims
    reader: WeightReader
    point: ResumePoint | None

    @property
    def resume(self) -> ResumePoint | None:
        """The checkpoint that is continued: weights, optimizer, position."""
        return None if self.point is None or self.point.weights_only else self.point


def pt(config: PtConfig) -> int:
    """`mswift pt`: continued pretraining on plain text."""
    return _run("pt", config)


def sft(config: SftConfig) -> int:
    """`mswift sft`: supervised fine-tuning on conversations."""
    return _run("sft", config)


def _run(kind: Kind, config: TrainConfig) -> int:
    if config.dry_run:
        from mswift.train.dry_run import dry_run

        return dry_run(config)
    info = current()
    if info is None and config.nproc_per_node is not None:
        prepare(kind, config, replace(RankInfo.single(), world_size=config.nproc_per_node))  # refuse before starting
        return local.run(mswift_job(config.nproc_per_node, kind, to_arguments(config), Path(config.output_dir)))
    info = info or RankInfo.single()
    with noting_refusals(Path(config.output_dir), info.rank):
        start = prepare(kind, config, info)
        with importing("mswift.train.job"):
            from mswift.parallel import device

            choose = device.prepare if config.backend == "megatron" else device.choose
            chosen = choose(config.device)  # before the first import of megatron.core
            from mswift.train.job import run_job

        return run_job(start, chosen)


def prepare(kind: Kind, config: TrainConfig, info: RankInfo) -> Start:
    """Find what to continue, open the weights, check the layout; raises ConfigError, LayoutError, CheckpointError."""
    model, point = start_of(config)
    reader = open_model(config, model)
    dims = check_train(config, reader.table.spec, info.world_size)
    for refusal in input_refusals(config, reader.table, reader.dtype):
        raise refusal
    return Start(kind, with_shared_sequences(config, reader.table.spec), info, dims, reader, point)
