"""The commands `mswift pt` and `mswift sft`: plan only, or train in this process as one rank of a job."""

from mswift.config.train import PtConfig, SftConfig, TrainConfig


def pt(config: PtConfig) -> int:
    """`mswift pt`: continued pretraining on plain text."""
    return _start("pt", config)


def sft(config: SftConfig) -> int:
    """`mswift sft`: supervised fine-tuning on conversations."""
    return _start("sft", config)


def _start(kind: str, config: TrainConfig) -> int:
    """torch is imported only once something is to be computed."""
    if config.dry_run:
        from mswift.train.dry_run import dry_run

        return dry_run(config)
    from mswift.train.job import run_job

    return run_job(kind, config)
