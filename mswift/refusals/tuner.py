"""What LoRA and the tuners of transformers models do not go with, told by the flags alone. No torch."""

import re
from collections.abc import Iterator, Mapping

from mswift.config.train import TrainConfig
from mswift.converters.adapters import NORM
from mswift.converters.spec import ModelSpec
from mswift.errors import ConfigError
from mswift.refusals.backend import FREEZING, HIDDEN_TUNERS, PROMPT_TUNERS
from mswift.refusals.engine import check_four_bit_base, check_part

_LORA_FLAGS = (
    *(
        "lora_rank",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "lora_dropout",
        "init_weights",
        "init_batches",
        "lora_ga_direction",
        "lora_ga_scale",
        "lora_ga_stable_gamma",
        "lorap_lr_ratio",
        "quant_method",
        "quant_bits",
        "bnb_4bit_quant_type",
        "tuner_config",
        "target_modules",
        "target_parameters",
    ),
    *("modules_to_save", "adapters"),
)
_INIT = re.compile(r"true|olora|pissa(_niter_[1-9][0-9]*)?|eva|lora_ga")
_FROM_DATA = ("eva", "lora_ga")
_OF_LORA_GA = ("lora_ga_direction", "lora_ga_scale", "lora_ga_stable_gamma")

OF_FSDP = ("longlora", *HIDDEN_TUNERS)
"""Values of --tuner_type that only the engine of transformers models trains."""

_FLAGS: Mapping[str, tuple[str, ...]] = {
    "adapter": ("adapter_length", "adapter_act"),
    "reft": ("reft_rank", "reft_layers"),
    "llamapro": ("llamapro_num_new_blocks", "llamapro_num_groups"),
    "xlora": ("xlora_adapters",),
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
                given = " ".join(map(str, value)) if isinstance(value, tuple) else value
                yield ConfigError(f"--{name} {given} has no effect with --tuner_type {tuner}: use --tuner_type {owner}")
            elif isinstance(value, int) and value < 1:
                yield ConfigError(f"--{name} {value} must be at least 1")
    if tuner == "llamapro":
        yield from _llamapro(config)
    if tuner in (*HIDDEN_TUNERS, *PROMPT_TUNERS, "xlora") and config.new_special_tokens:
        yield ConfigError(
            f"--new_special_tokens {config.new_special_tokens[0]} with --tuner_type {tuner}: their rows would stay as "
            "they start, since no weight of the model is trained: use --tuner_type full or lora"
        )
    if tuner in PROMPT_TUNERS and config.neftune_noise_alpha:
        yield ConfigError(
            f"--neftune_noise_alpha {config.neftune_noise_alpha} with --tuner_type {tuner}: the noise would be on "
            "virtual tokens too: leave it out"
        )
    if tuner == "longlora":
        yield from _longlora(config)
    if tuner == "xlora":
        yield from _xlora(config)
    if config.backend == "megatron" and NORM in config.modules_to_save:
        yield ConfigError(f"--modules_to_save {NORM} is for transformers' model: use --backend fsdp, or leave it out")
    yield from _lisa(config)


def check_tuner(config: TrainConfig, spec: ModelSpec) -> None:
    """ConfigError for a tuner that does not fit the model."""
    if config.lisa_activated_layers > spec.num_layers:
        raise ConfigError(
            f"--lisa_activated_layers {config.lisa_activated_layers} of a model with {spec.num_layers} layers: use "
            f"--lisa_activated_layers {spec.num_layers - 1} or less"
        )
    trains_a_part = config.tuner_type == "llamapro" or any(
        getattr(config, name) != TrainConfig.__dataclass_fields__[name].default for name in FREEZING
    )
    if config.backend == "megatron" and trains_a_part:
        check_part(spec)
    if config.tuner_type == "longlora" and spec.num_attention_heads % 2:
        raise ConfigError(
            f"--tuner_type longlora: {spec.num_attention_heads} attention heads have no halves: use --tuner_type lora"
        )


def _xlora(config: TrainConfig) -> Iterator[ConfigError]:
    if config.neftune_noise_alpha:
        yield ConfigError(
            f"--neftune_noise_alpha {config.neftune_noise_alpha} with --tuner_type xlora: its classifier would read "
            "hidden states of noise: leave it out"
        )
    if config.torch_compile:
        yield ConfigError(
            "--torch_compile with --tuner_type xlora: scales of tokens come into layers from outside of what is "
            "compiled: leave --torch_compile out"
        )


def _longlora(config: TrainConfig) -> Iterator[ConfigError]:
    if config.packing:
        yield ConfigError(
            "--packing with --tuner_type longlora: groups of a row would join its samples: leave --packing out, or use "
            "--tuner_type lora"
        )
    for name in ("context_parallel_size", "sequence_parallel_size"):
        if (getattr(config, name) or 1) > 1:
            yield ConfigError(
                f"--{name} {getattr(config, name)} with --tuner_type longlora: groups of a row would lie on several "
                f"ranks: leave --{name} out, or use --tuner_type lora"
            )
    if config.adapters:
        yield ConfigError(
            f"--adapters {config.adapters[0]} with --tuner_type longlora starts with other modules than it trains: "
            "leave it out, or use --tuner_type lora"
        )


def _lisa(config: TrainConfig) -> Iterator[ConfigError]:
    active, interval = config.lisa_activated_layers, config.lisa_step_interval
    if active < 0:
        yield ConfigError(f"--lisa_activated_layers {active} must not be negative: use --lisa_activated_layers 2")
    if interval < 1:
        yield ConfigError(f"--lisa_step_interval {interval} must be at least 1")
    if not active:
        if interval != TrainConfig.__dataclass_fields__["lisa_step_interval"].default:
            yield ConfigError(f"--lisa_step_interval {interval} has no effect without --lisa_activated_layers 2")
        return
    given = f"--lisa_activated_layers {active}"
    if config.backend == "megatron":
        yield ConfigError(f"{given} is for transformers' model: use --backend fsdp (or ddp), or leave it out")
    if config.tuner_type != "full":
        yield ConfigError(f"{given} with --tuner_type {config.tuner_type}: LISA trains in full: use --tuner_type full")
    if config.optimizer not in ("adam", "sgd"):
        yield ConfigError(
            f"{given} with --optimizer {config.optimizer}, whose state is not dropped layer by layer: use --optimizer "
            "adam"
        )
    for name in FREEZING:
        if getattr(config, name) != TrainConfig.__dataclass_fields__[name].default:
            yield ConfigError(f"{given} and --{name} both say what is frozen: leave one of them out")


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


def _quantised_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    if config.quant_method is None:
        for name in ("quant_bits", "bnb_4bit_quant_type"):
            value = getattr(config, name)
            if value != type(config).__dataclass_fields__[name].default:
                yield ConfigError(f"--{name} {value} has no effect without --quant_method bnb")
        return
    method = config.quant_method
    if method == "bnb" and config.quant_bits is None:
        yield ConfigError("--quant_method bnb needs the number of bits: --quant_bits 4")
    if method != "bnb" and config.bnb_4bit_quant_type != "nf4":
        yield ConfigError(
            f"--bnb_4bit_quant_type {config.bnb_4bit_quant_type} has no effect with --quant_method {method}: leave it "
            "out"
        )
    try:
        check_four_bit_base(config.trains_lora, config.use_dora, method)
    except ConfigError as error:
        yield error
    if config.init_weights != "true":
        yield ConfigError(
            f"--quant_method {method} with --init_weights {config.init_weights}, which starts from the whole weight, "
            "is not supported: leave one of them out"
        )


def _data_start_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    """Of starts that take a pass over data."""
    given = f"--init_weights {config.init_weights}"
    for name in ("init_batches", *_OF_LORA_GA):
        value, owners = getattr(config, name), ("lora_ga",) if name in _OF_LORA_GA else _FROM_DATA
        if value != TrainConfig.__dataclass_fields__[name].default and config.init_weights not in owners:
            yield ConfigError(f"--{name} {value} has no effect with {given}: use --init_weights {owners[-1]}")
        elif isinstance(value, int) and value < 1:
            yield ConfigError(f"--{name} {value} must be at least 1")
    if config.init_weights not in _FROM_DATA:
        return
    if config.backend not in ("fsdp", "ddp"):
        yield ConfigError(f"{given} is computed on transformers' model: use --backend fsdp (or ddp), or pissa")
    if config.tuner_type != "lora":
        yield ConfigError(f"{given} with --tuner_type {config.tuner_type} is not computed: use --tuner_type lora")
    if config.streaming:
        yield ConfigError(f"{given} with --streaming: a stream does not begin again after the start: leave one out")
    if config.torch_compile:
        yield ConfigError(f"{given} with --torch_compile: inside of compiled layers nothing is seen: leave one out")


def lora_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    """What flags of LoRA go with it, and with no other."""
    if config.trains_lora:
        if not _INIT.fullmatch(config.init_weights):
            yield ConfigError(
                f"--init_weights {config.init_weights}: known: true pissa pissa_niter_N (as pissa_niter_16) olora "
                "eva lora_ga"
            )
        if config.adapters and config.init_weights != "true":
            yield ConfigError(
                f"--init_weights {config.init_weights} with --adapters {config.adapters[0]}, which has its values: "
                "leave one of them out"
            )
        if len(config.adapters) > 1:
            yield ConfigError(f"--adapters names {len(config.adapters)} adapters; training continues 1 adapter")
        if config.tuner_config is not None:
            yield ConfigError("--tuner_config is for methods other than LoRA, which has flags of its own: leave it out")
        yield from _quantised_refusals(config)
        yield from _data_start_refusals(config)
        return
    if config.trains_adapter:
        if len(config.adapters) > 1:
            yield ConfigError(f"--adapters names {len(config.adapters)} adapters; training continues 1 adapter")
        if config.tuner_type not in (*HIDDEN_TUNERS, *PROMPT_TUNERS, "xlora"):
            return
    for name in _LORA_FLAGS:
        value = getattr(config, name)
        if name == "adapters" and config.tuner_type in HIDDEN_TUNERS:
            continue
        if name in ("adapters", "tuner_config") and config.tuner_type in (*PROMPT_TUNERS, "xlora"):
            continue
        if value != type(config).__dataclass_fields__[name].default:
            given = " ".join(value) if isinstance(value, tuple) else value
            yield ConfigError(
                f"--{name} {given} has no effect with --tuner_type {config.tuner_type}: use --tuner_type lora"
            )
