"""The flags of a command -> what decides its samples; one rule for training and for `mswift data`."""

from typing import Any

from mswift.config.data import DataConfig
from mswift.config.train import TrainConfig
from mswift.data.dataset import DataOptions, Kind
from mswift.data.loss_scale import parse_loss_scale
from mswift.data.selection import Selection
from mswift.refusals.data import parse_columns


def data_options(kind: Kind, config: TrainConfig | DataConfig) -> DataOptions:
    """All but what the model and a mixture decide. ConfigError: --columns or --loss_scale means nothing."""
    of_conversations: dict[str, Any] = {}
    if kind == "sft":
        flags: Any = config  # those of SftConfig, which DataConfig has too
        of_conversations = {
            "truncation_strategy": flags.truncation_strategy,
            "system": flags.system,
            "loss_scale": parse_loss_scale(flags.loss_scale, by_channel=flags.enable_channel_loss),
            "agent_template": flags.agent_template,
        }
    return DataOptions(
        max_length=config.max_length,
        cache_dir=config.cache_dir,
        selection=Selection(config.dataset_sampling, config.seed, config.split_dataset_ratio),
        columns=parse_columns(config.columns),
        strict=config.strict,
        num_proc=config.dataset_num_proc,
        **of_conversations,
    )
