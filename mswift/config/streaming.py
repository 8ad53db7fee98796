"""What --streaming goes with."""

from collections.abc import Iterator
from typing import Any

from mswift.config.train import PtConfig, SftConfig, TrainConfig
from mswift.errors import ConfigError


def streaming_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    """Flags that need to know all samples before the first step."""
    default: Any = TrainConfig.__dataclass_fields__["streaming_block_rows"].default
    if not config.streaming:
        if config.streaming_block_rows != default:
            yield ConfigError(f"--streaming_block_rows {config.streaming_block_rows} belongs to --streaming: add it")
        return
    if config.num_train_epochs is not None:
        yield ConfigError(
            f"--num_train_epochs {config.num_train_epochs:g} and --streaming: nobody knows how many samples there are; "
            "say the number of steps, --train_iters 1000, or leave out --streaming"
        )
    if config.split_dataset_ratio:
        yield ConfigError(
            f"--split_dataset_ratio {config.split_dataset_ratio:g} draws from all rows, which --streaming does not "
            "read first: name the files to evaluate on with --val_dataset"
        )
    if isinstance(config, PtConfig) and config.data_path:
        yield ConfigError("--data_path is tokenised already, and read as it is needed: leave out --streaming")
    if isinstance(config, SftConfig) and config.enable_channel_loss:
        yield ConfigError(
            "--enable_channel_loss needs the names of all channels before the first step, which --streaming does not "
            "read: leave out one of them"
        )
