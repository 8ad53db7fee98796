"""What the tuners of transformers models beside LoRA do not go with, told by the flags alone. No torch."""

from collections.abc import Iterator, Mapping

from mswift.config.train import TrainConfig
from mswift.errors import ConfigError

OF_FSDP = ("llamapro",)
"""Values of --tuner_type that only the engine of transformers models trains."""

_FLAGS: Mapping[str, tuple[str, ...]] = {
    "llamapro": ("llamapro_num_new_blocks", "llamapro_num_groups"),
}
"""Tuner -> the flags that are its alone."""


def tuner_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    """ConfigErrors, each with the flag, its value and what to do."""
    tuner = config.tuner_type
    if config.backend == "megatron" and tuner in OF_FSDP:
        yield ConfigError(
            f"--tuner_type {tuner} trains transformers' model: use --backend fsdp (or ddp), or --tuner_type full (or "
            "lora)"
        )
    for owner, flags in _FLAGS.items():
        for name in flags:
            value = getattr(config, name)
            if tuner != owner and value != TrainConfig.__dataclass_fields__[name].default:
                yield ConfigError(f"--{name} {value} has no effect with --tuner_type {tuner}: use --tuner_type {owner}")
            elif isinstance(value, int) and value < 1:
                yield ConfigError(f"--{name} {value} must be at least 1")
    if tuner == "llamapro":
        yield from _llamapro(config)


def _llamapro(config: TrainConfig) -> Iterator[ConfigError]:
    if config.new_special_tokens:
        yield ConfigError(
            f"--new_special_tokens {config.new_special_tokens[0]} with --tuner_type llamapro: their rows would stay as "
            "they start, since the new blocks alone are trained: use --tuner_type full or lora"
        )
    if config.load_weights_only:
        yield ConfigError(
            f"--load_weights_only with --tuner_type llamapro: add blocks to --model {config.resume_from_checkpoint}, "
            "or train those it has: --tuner_type full --trainable_parameters model.layers.N. (of each) "
            "--freeze_parameters_regex ."
        )
