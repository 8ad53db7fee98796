"""What --backend deepspeed does not do, and a --deepspeed file that says something else than the flags."""

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from mswift.config.deepspeed import Zero, read_zero
from mswift.config.optimizers import ELEMENTWISE
from mswift.config.train import TrainConfig
from mswift.errors import ConfigError
from mswift.topology import ParallelDims

_FSDP_ONLY = ("fsdp_shard_size", "fsdp_reshard_after_forward", "fsdp_cpu_offload", "torch_compile", "use_liger_kernel")
_TYPES = {"adam": ("AdamW", "Adam"), "sgd": ("SGD",), "lion": ("Lion",)}
"""What DeepSpeed calls an update rule (its Adam decays as AdamW does)."""


def zero_of(config: TrainConfig) -> Zero | None:
    """What --deepspeed means, None with another backend; ConfigError where it makes no sense."""
    return read_zero(config.deepspeed) if config.backend == "deepspeed" else None


def deepspeed_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    """Those of --backend deepspeed that the flags alone tell."""
    if find_spec("deepspeed") is None:
        yield ConfigError(
            "--backend deepspeed needs deepspeed, which is not installed: pip install 'mswift[deepspeed]', or use "
            "--backend fsdp"
        )
    for name in _FSDP_ONLY:
        if getattr(config, name) != type(config).__dataclass_fields__[name].default:
            remedy = "; --deepspeed zero3_offload keeps them there" if name == "fsdp_cpu_offload" else ""
            yield ConfigError(f"--{name} is not for --backend deepspeed: leave it out, or use --backend fsdp{remedy}")
    if config.quant_method is not None:
        yield ConfigError(
            f"--quant_method {config.quant_method} is not for --backend deepspeed: use --backend fsdp (or ddp), or "
            "--backend megatron"
        )
    if config.tuner_type == "adalora":
        yield ConfigError(
            "--tuner_type adalora is not for --backend deepspeed, where no rank has whole gradients: use --backend "
            "fsdp (or ddp), or --tuner_type lora"
        )
    if config.optimizer not in ELEMENTWISE:
        yield ConfigError(
            f"--optimizer {config.optimizer}: ZeRO cuts parameters anywhere, and this rule needs them in whole or by "
            f"blocks: use {', '.join(ELEMENTWISE)}, or --backend fsdp"
        )
    if config.lisa_activated_layers:
        yield ConfigError(
            f"--lisa_activated_layers {config.lisa_activated_layers}: the parameters that --backend deepspeed updates "
            "stay the same for the run: use --backend fsdp"
        )
    try:
        zero = read_zero(config.deepspeed)
    except ConfigError as error:
        yield error
        return
    yield from _stage_3_refusals(config, zero)
    yield from _disagreements(config, zero)


def _stage_3_refusals(config: TrainConfig, zero: Zero) -> Iterator[ConfigError]:
    if zero.stage < 3:
        return
    needing = {"--use_dora": config.use_dora, f"--init_weights {config.init_weights}": config.init_weights != "true"}
    for flag in (flag for flag, given in needing.items() if given):
        yield _needs_whole_weights(config, flag)
    if config.tuner_type == "xlora":
        yield ConfigError(
            f"--tuner_type xlora keeps its LoRAs whole on every rank, which ZeRO-3 (--deepspeed {config.deepspeed}) "
            "would cut: use --deepspeed zero2, or --backend fsdp"
        )


def check_adapter_stage(config: TrainConfig, path: str, *, dora: bool) -> None:
    """ConfigError for an adapter to continue that ZeRO-3 does not train."""
    zero = zero_of(config)
    if dora and zero is not None and zero.stage == 3:
        raise _needs_whole_weights(config, f"--adapters {path}, a DoRA,")


def _needs_whole_weights(config: TrainConfig, what: str) -> ConfigError:
    return ConfigError(
        f"{what} begins with whole weights, which no rank has with ZeRO-3 (--deepspeed {config.deepspeed}): use "
        "--deepspeed zero2, or --backend fsdp"
    )


def _disagreements(config: TrainConfig, zero: Zero) -> Iterator[ConfigError]:
    """Where the file says something else than the flags: the key, both values, the remedy."""
    betas = [config.adam_beta1, config.adam_beta2]
    of_flags: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("--global_batch_size", config.global_batch_size),
        "train_micro_batch_size_per_gpu": ("--micro_batch_size", config.micro_batch_size),
        "gradient_clipping": ("--clip_grad", config.clip_grad),
        "fp16.enabled": ("training in float32 or bfloat16, as --torch_dtype says,", False),
        "optimizer.params.lr": ("--lr", config.lr),
        "optimizer.params.betas": ("--adam_beta1 and --adam_beta2", betas),
        "optimizer.params.eps": ("--adam_eps", config.adam_eps),
        "optimizer.params.weight_decay": ("--weight_decay", config.weight_decay),
        "optimizer.params.momentum": ("--sgd_momentum", config.sgd_momentum),
        "optimizer.params.torch_adam": ("torch's rule, which is what updates here,", True),
        "optimizer.params.adam_w_mode": ("AdamW, which --optimizer adam is,", True),
    }
    for key, (flag, wanted) in of_flags.items():
        if key in zero.says and zero.says[key] != wanted:
            yield _disagreement(config, key, zero.says[key], flag, wanted)
    name = zero.says.get("optimizer.type")
    if name is not None and name not in _TYPES.get(config.optimizer, ()):
        yield _disagreement(config, "optimizer.type", name, "--optimizer", config.optimizer)


def check_accumulation(config: TrainConfig, dims: ParallelDims) -> None:
    """ConfigError where the file has another number of microbatches than a step of this layout."""
    zero = zero_of(config)
    key, number = "gradient_accumulation_steps", config.global_batch_size // (config.micro_batch_size * dims.dp)
    if zero is not None and zero.says.get(key, number) != number:
        meaning = f"--global_batch_size {config.global_batch_size} on {dims.dp} data-parallel ranks"
        raise _disagreement(config, key, zero.says[key], meaning, number)


def check_precision(config: TrainConfig, dtype: str) -> None:
    """ConfigError where the file trains in another dtype ("F32", "BF16") than the run."""
    try:
        zero = zero_of(config)
    except ConfigError:
        return  # refused where the flags are
    wanted = dtype == "BF16"
    if zero is not None and zero.says.get("bf16.enabled", wanted) != wanted:
        dtypes = {"BF16": "bfloat16", "F32": "float32"}
        raise _disagreement(config, "bf16.enabled", zero.says["bf16.enabled"], f"training in {dtypes[dtype]}", wanted)


def check_modules_in_full(config: TrainConfig, dtype: str, modules: Sequence[str]) -> None:
    """ConfigError for modules to train in full, in bf16, beside an adapter that is no LoRA and is fp32 everywhere."""
    other = config.trains_adapter and not config.trains_lora
    if config.backend == "deepspeed" and other and modules and dtype == "BF16":
        raise ConfigError(
            f"--tuner_type {config.tuner_type} with {' and '.join(modules)} in full (--modules_to_save, "
            "--new_special_tokens), in bfloat16: DeepSpeed updates one dtype, and the adapter is float32: use "
            "--torch_dtype float32, or --backend fsdp (or ddp)"
        )


def _disagreement(config: TrainConfig, key: str, says: Any, flag: str, wanted: Any) -> ConfigError:
    return ConfigError(
        f"--deepspeed {config.deepspeed}: {key} {json.dumps(says)}, but {flag} means {json.dumps(wanted)}: use "
        f'"auto" there, or change the flag'
    )
