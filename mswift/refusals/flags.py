"""What the flags of a training run alone tell: numbers out of range, flags that exclude each other, its length."""

import math
from collections.abc import Iterator

from mswift.config.streaming import streaming_refusals
from mswift.config.train import PtConfig, TrainConfig
from mswift.errors import ConfigError
from mswift.refusals.backend import backend_refusals
from mswift.refusals.data import data_path_refusals, data_refusals
from mswift.refusals.engine import engine_flag_refusals
from mswift.refusals.tuner import lora_refusals, tuner_refusals

_LARGEST_SEED = 2**32 - 1
_AT_LEAST_ONE = (
    *("micro_batch_size", "global_batch_size", "lr_decay_iters", "lr_wsd_decay_iters"),
    *(
        "save_steps",
        "save_hf_steps",
        "save_total_limit",
        "eval_steps",
        "logging_steps",
        "nproc_per_node",
        "world_size",
        "lora_rank",
        "recompute_num_layers",
        "packing_length",
        "dataset_num_proc",
        "streaming_block_rows",
    ),
    *("max_model_len", "fsdp_shard_size", "sequence_parallel_size"),
)
_NOT_NEGATIVE = ("mtp_num_layers", "lr", "min_lr", "lr_warmup_iters", "weight_decay", "clip_grad", "seed")
_BELOW_ONE = ("adam_beta1", "adam_beta2", "sgd_momentum", "lora_dropout")
_USUAL = {"lora_dropout": 0.05}


def flag_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    """Every one of them."""
    yield from _range_refusals(config)
    yield from _length_refusals(config)
    yield from lora_refusals(config)
    yield from tuner_refusals(config)
    yield from engine_flag_refusals(config)
    yield from backend_refusals(config)
    if config.min_lr > config.lr >= 0:
        yield ConfigError(f"--min_lr {config.min_lr} is above --lr {config.lr}: use --min_lr {config.lr} or less")
    yield from _schedule_refusals(config)
    data_path = config.data_path if isinstance(config, PtConfig) else ()
    if data_path:
        yield from data_path_refusals(config, data_path)
    elif not config.dataset:
        yield ConfigError("--dataset is required: give one file or more, as --dataset FILE#N for N of its rows")
    yield from data_refusals(config)
    yield from streaming_refusals(config)
    yield from _start_refusals(config)
    if config.world_size is not None and not config.dry_run:
        yield ConfigError(
            f"--world_size {config.world_size} is for --dry_run; a real job takes its size from "
            f"--nproc_per_node {config.world_size}, torchrun or SLURM"
        )
    sizes = (config.world_size, config.nproc_per_node)
    if config.dry_run and None not in sizes and sizes[0] != sizes[1]:
        yield ConfigError(f"--world_size {sizes[0]} and --nproc_per_node {sizes[1]} differ: leave one out")


def _schedule_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    """Flags of another shape than that of the schedule."""
    style, fields = config.lr_decay_style, type(config).__dataclass_fields__
    for name in ("lr_wsd_decay_iters", "lr_wsd_decay_style"):
        if style != "WSD" and getattr(config, name) != fields[name].default:
            yield ConfigError(
                f"--{name} {getattr(config, name)} belongs to --lr_decay_style WSD, not {style}: leave it out, or use "
                "--lr_decay_style WSD"
            )
    if style == "constant" and config.min_lr:
        yield ConfigError(
            f"--min_lr {config.min_lr} has no effect with --lr_decay_style constant: use --min_lr 0, or "
            "--lr_decay_style linear"
        )
    if style == "constant" and config.lr_decay_iters is not None:
        yield ConfigError(
            f"--lr_decay_iters {config.lr_decay_iters} has no effect with --lr_decay_style constant: leave it out, or "
            "use --lr_decay_style linear"
        )


def wsd_decay_iters(config: TrainConfig, decay: int) -> int:
    """Length of WSD's final decay in a schedule of `decay` steps."""
    return config.lr_wsd_decay_iters or max(decay // 10, 1)


def check_schedule(config: TrainConfig, num_steps: int) -> None:
    """ConfigError when the learning-rate schedule does not fit a run of `num_steps` optimizer steps."""
    decay = config.lr_decay_iters or num_steps
    length = f"--lr_decay_iters {decay}" if config.lr_decay_iters else f"the {decay} steps of the run"
    warmup = config.lr_warmup_iters
    if config.lr_decay_style == "constant":
        return
    if warmup >= decay:
        raise ConfigError(
            f"--lr_warmup_iters {warmup} leaves nothing of {length}: use --lr_warmup_iters {decay - 1} or less"
        )
    wsd = wsd_decay_iters(config, decay)
    if config.lr_decay_style == "WSD" and warmup + wsd > decay:
        raise ConfigError(
            f"--lr_wsd_decay_iters {wsd} and --lr_warmup_iters {warmup} are longer than {length}: "
            f"use --lr_wsd_decay_iters {decay - warmup} or less"
        )


def _start_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    """What --load_weights_only goes with."""
    if config.load_weights_only and config.resume_from_checkpoint is None:
        yield ConfigError("--load_weights_only needs the checkpoint: add --resume_from_checkpoint RUN/checkpoint-N")
    if config.load_weights_only and config.adapters:
        yield ConfigError(
            f"--adapters {config.adapters[0]} and --load_weights_only both bring an adapter: leave one out"
        )


def _range_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    """Numbers outside their range; nan is outside every range."""
    for name in _AT_LEAST_ONE:
        value = getattr(config, name)
        if value is not None and not value >= 1:
            yield ConfigError(f"--{name} {value} must be at least 1: use --{name} 1 or more")
    if config.max_length < 2:
        yield ConfigError(
            f"--max_length {config.max_length}: a sample needs at least 2 tokens, one to predict from and one to "
            "predict: use --max_length 2 or more"
        )
    if config.seed > _LARGEST_SEED:
        yield ConfigError(f"--seed {config.seed} is above {_LARGEST_SEED}: use --seed {_LARGEST_SEED} or less")
    for name in _NOT_NEGATIVE:
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            yield ConfigError(f"--{name} {value} must be a number from 0 on: use --{name} 0 or more")
    for name in _BELOW_ONE:
        value = getattr(config, name)
        if not 0 <= value < 1:
            yield ConfigError(f"--{name} {value} must lie from 0 to below 1: use --{name} {_USUAL.get(name, 0.9)}")
    for name in ("adam_eps", "lora_alpha", "lorap_lr_ratio", "distributed_timeout_minutes"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            default = type(config).__dataclass_fields__[name].default or 16
            yield ConfigError(f"--{name} {value} must be above 0: use --{name} {default}")


def _length_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    """How long the run is, exactly once, and the schedule where the flags alone decide it."""
    steps, epochs = config.train_iters, config.num_train_epochs
    if steps is None and epochs is None:
        yield ConfigError("the length of the run is missing: use --train_iters 1000 or --num_train_epochs 1")
    elif steps is not None and epochs is not None:
        yield ConfigError(f"--train_iters {steps} and --num_train_epochs {epochs} both say how long: leave one out")
    elif epochs is not None and not 0 < epochs < math.inf:
        yield ConfigError(f"--num_train_epochs {epochs} must be above 0: use --num_train_epochs 1")
    if steps is not None and steps < 0:
        yield ConfigError(f"--train_iters {steps} must be a number from 0 on: use --train_iters 0 or more")
    elif steps:
        try:
            check_schedule(config, steps)
        except ConfigError as error:
            yield error
