"""What engines of transformers models (--backend fsdp, ddp, deepspeed) do not do, and the flags that are theirs."""

import math
from collections.abc import Iterator
from dataclasses import MISSING, replace
from importlib.util import find_spec

from mswift.config.optimizers import (
    ELEMENTWISE,
    LIBRARIES,
    LOW_RANK,
    OF_LAYERS,
    OF_MEGATRON,
    OF_QUANTIZED,
    QUANTIZED,
)
from mswift.config.train import TrainConfig
from mswift.converters.spec import ModelSpec
from mswift.errors import ConfigError, LayoutError
from mswift.refusals.deepspeed import check_accumulation, deepspeed_refusals, zero_of
from mswift.topology import ParallelDims, divisors

_MEGATRON_ONLY = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("num_layers_per_virtual_pipeline_stage", "decoder_first_pipeline_num_layers"),
    *("decoder_last_pipeline_num_layers", "pipeline_model_parallel_layout", "expert_model_parallel_size"),
    *("expert_tensor_parallel_size", "sequence_parallel", "overlap_grad_reduce", "overlap_param_gather"),
    *("gradient_accumulation_fusion", "recompute_modules", "mtp_num_layers", "mcore"),
)
HIDDEN_TUNERS = ("adapter", "reft")
"""Values of --tuner_type that change hidden states (`mswift.tuners.hidden`)."""
PROMPT_TUNERS = ("prompt", "ptuning", "prefix")
"""Those that put virtual tokens before every sequence (`mswift.tuners.prompts`)."""
FREEZING = (
    *("freeze_parameters_ratio", "freeze_parameters", "freeze_parameters_regex"),
    *("trainable_parameters", "trainable_parameters_regex"),
)
LIGER_TYPES = (
    *("gemma", "gemma2", "gemma3_text", "glm4", "gpt_oss", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2"),
    "qwen3",
)
"""Kinds of models whose kernels of Liger's were compared with transformers' (tests/system/test_liger.py)."""
_FSDP_ONLY = (
    *("fsdp_shard_size", "fsdp_reshard_after_forward", "fsdp_cpu_offload", "torch_compile"),
    "use_liger_kernel",
)


def with_shared_sequences(config: TrainConfig, spec: ModelSpec) -> TrainConfig:
    """--sequence_parallel_size as the context-parallel flags that it means for this model."""
    size = config.sequence_parallel_size
    if size is None:
        return config
    heads = spec.num_kv_heads if spec.mla is None else spec.num_attention_heads
    exchanging = math.gcd(size, max(heads // max(config.tensor_model_parallel_size, 1), 1))
    levels = () if exchanging in (1, size) else (exchanging, size // exchanging)
    return replace(
        config,
        sequence_parallel_size=None,
        context_parallel_size=size,
        cp_comm_type="a2a+p2p" if levels else "p2p" if exchanging == 1 else "a2a",
        hierarchical_context_parallel_sizes=levels,
    )


def backend_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    """Those that the flags alone tell."""
    if config.sequence_parallel_size is not None:
        for name in ("context_parallel_size", "cp_comm_type", "hierarchical_context_parallel_sizes"):
            if _is_given(config, name):
                yield ConfigError(
                    f"--sequence_parallel_size {config.sequence_parallel_size} stands for --{name} too: leave one out"
                )
    yield from _freezing_refusals(config)
    if config.neftune_noise_alpha < 0:
        yield ConfigError(f"--neftune_noise_alpha {config.neftune_noise_alpha}: at least 0; 5 is usual")
    yield from _optimizer_refusals(config)
    if config.backend == "deepspeed":
        yield from deepspeed_refusals(config)
    elif _is_given(config, "deepspeed"):
        yield ConfigError(f"--deepspeed {config.deepspeed} belongs to --backend deepspeed: add it, or leave this out")
    yield from _of_megatron(config) if config.backend == "megatron" else _of_transformers(config)


def _freezing_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    freezing = [name for name in FREEZING if _is_given(config, name)]
    if freezing and config.tuner_type != "full":
        yield ConfigError(
            f"--{freezing[0]} is for --tuner_type full; of {config.tuner_type} the base is frozen: leave it out"
        )
    elif freezing and not any(name.startswith("freeze") for name in freezing):
        value = getattr(config, freezing[0])
        yield ConfigError(
            f"--{freezing[0]} {_shown(value)}: nothing is frozen, so that all of the model is trained: add "
            "--freeze_parameters_regex . to train these parameters alone, or leave it out"
        )
    if not 0 <= config.freeze_parameters_ratio < 1:
        yield ConfigError(
            f"--freeze_parameters_ratio {config.freeze_parameters_ratio}: a share of the model, at least 0 and below 1"
        )


def _of_megatron(config: TrainConfig) -> Iterator[ConfigError]:
    if config.neftune_noise_alpha and config.mtp_num_layers:
        yield ConfigError(
            f"--neftune_noise_alpha {config.neftune_noise_alpha} with --mtp_num_layers {config.mtp_num_layers}: the "
            "noise would be on the tokens ahead too: leave one out"
        )
    for name in _FSDP_ONLY:
        if _is_given(config, name):
            yield ConfigError(f"--{name} belongs to --backend fsdp (or ddp): leave it out, or use --backend fsdp")
    if config.trains_adapter and not config.trains_lora and config.tuner_type not in HIDDEN_TUNERS:
        yield ConfigError(
            f"--tuner_type {config.tuner_type} is computed by PEFT on transformers' model: use --backend fsdp (or "
            "ddp), or --tuner_type lora"
        )


def _of_transformers(config: TrainConfig) -> Iterator[ConfigError]:
    for name in _MEGATRON_ONLY:
        if _is_given(config, name):
            value = getattr(config, name)
            what = f"--mcore.{next(iter(value))}" if name == "mcore" else f"--{name} {_shown(value)}"
            yield ConfigError(f"{what} is not for --backend {config.backend}: leave it out, or use --backend megatron")
    if config.backend == "fsdp" and config.quant_method and (config.fsdp_cpu_offload or config.torch_compile):
        flag = "--fsdp_cpu_offload" if config.fsdp_cpu_offload else "--torch_compile"
        yield ConfigError(
            f"--quant_method {config.quant_method} with {flag}: the codes of the base lie where it computes, and are "
            f"unpacked outside of what torch knows: leave {flag} out"
        )
    yield from _costs(config)


def _costs(config: TrainConfig) -> Iterator[ConfigError]:
    """How parameters lie, what is computed again, what is compiled."""
    if config.backend == "ddp" and config.fsdp_shard_size is not None:
        yield ConfigError(
            f"--fsdp_shard_size {config.fsdp_shard_size}: --backend ddp cuts no parameters: leave it out, or use "
            "--backend fsdp"
        )
    if config.torch_compile and config.recompute_granularity == "selective":
        yield ConfigError(
            "--recompute_granularity selective chooses among single operators, which --torch_compile joins: use full, "
            "or leave one out"
        )
    if config.torch_compile and config.use_liger_kernel:
        yield ConfigError("--torch_compile with --use_liger_kernel: kernels of both: leave one out")
    if config.use_liger_kernel and find_spec("liger_kernel") is None:
        yield ConfigError(
            "--use_liger_kernel needs liger-kernel, which is not installed: pip install 'mswift[liger]', or leave it "
            "out (output layer and loss are fused without it: --cross_entropy_loss_fusion)"
        )
    if config.fsdp_cpu_offload and config.trains_adapter and not config.trains_lora:
        yield ConfigError(
            f"--fsdp_cpu_offload: parameters of --tuner_type {config.tuner_type} are not all cut: leave it "
            "out, or use lora"
        )
    if config.backend == "ddp" and config.fsdp_cpu_offload:
        yield ConfigError(
            "--fsdp_cpu_offload: --backend ddp keeps its parameters where it computes: leave it out, or use "
            "--backend fsdp"
        )
    if config.recompute_method == "uniform" and (config.recompute_num_layers or 1) > 1:
        yield ConfigError(
            f"--recompute_num_layers {config.recompute_num_layers} with --recompute_method uniform: --backend "
            f"{config.backend} computes single layers again: use 1, or --recompute_method block"
        )


_WITH_ADAM = ("adam", "adamw_8bit", *OF_LAYERS)
_OF_OPTIMIZERS = {
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (*_WITH_ADAM, "lion")),
    "adam_eps": _WITH_ADAM,
    "sgd_momentum": ("sgd",),
    "muon_momentum": ("muon",),
    **dict.fromkeys(("galore_rank", "galore_update_proj_gap", "galore_scale"), LOW_RANK),
    "galore_quantization": ("galore",),
}


def _optimizer_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    chosen = config.optimizer
    for name, owners in _OF_OPTIMIZERS.items():
        if _is_given(config, name) and chosen not in owners:
            shown = " and ".join(filter(None, (", ".join(owners[:-1]), owners[-1])))
            yield ConfigError(f"--{name} belongs to --optimizer {shown}: leave it out")
    if config.galore_rank < 1 or config.galore_update_proj_gap < 1:
        yield ConfigError(
            f"--galore_rank {config.galore_rank}, --galore_update_proj_gap {config.galore_update_proj_gap}: at least 1"
        )
    yield from _quantized_refusals(config)
    if config.backend == "megatron" and chosen not in OF_MEGATRON:
        yield ConfigError(
            f"--optimizer {chosen} is not for --backend megatron: use {' or '.join(OF_MEGATRON)}, or --backend fsdp"
        )
    elif chosen in OF_LAYERS and config.trains_adapter:
        yield ConfigError(
            f"--optimizer {chosen} is for the matrices of a model that is trained in full, not for adapters: use adam, "
            "lion, adafactor or adamw_8bit"
        )
    elif chosen not in ELEMENTWISE and config.trains_adapter and not config.trains_lora:
        yield ConfigError(
            f"--optimizer {chosen} is not for the parameters of --tuner_type {config.tuner_type}: use "
            f"{', '.join(ELEMENTWISE)}"
        )
    if config.lisa_activated_layers and chosen not in ELEMENTWISE:
        yield ConfigError(
            f"--optimizer {chosen} with --lisa_activated_layers {config.lisa_activated_layers}: state that is dropped "
            f"with its layer is that of {', '.join(ELEMENTWISE)}: use one of these"
        )
    package = LIBRARIES.get(QUANTIZED if chosen == "galore" and config.galore_quantization else chosen)
    if package is not None and find_spec(package) is None:
        yield ConfigError(
            f"--optimizer {chosen} needs {package.replace('_', '-')}, which is not installed: "
            "pip install 'mswift[optim]', or use adam"
        )


def _quantized_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    for name in OF_QUANTIZED:
        if _is_given(config, name) and not config.galore_quantization:
            yield ConfigError(f"--{name} belongs to --galore_quantization true: leave it out")
    for name in ("galore_gamma_proj", "galore_queue_size"):
        if getattr(config, name) < 1:
            yield ConfigError(f"--{name} {getattr(config, name)}: at least 1")
    if config.galore_proj_group_size < 2 or config.galore_proj_group_size % 2:
        yield ConfigError(f"--galore_proj_group_size {config.galore_proj_group_size}: an even number, at least 2")
    if config.galore_cos_threshold < 0:
        yield ConfigError(f"--galore_cos_threshold {config.galore_cos_threshold:g}: at least 0; above 1 is never")


def check_backend(config: TrainConfig, spec: ModelSpec, dims: ParallelDims) -> None:
    """ConfigError for a model or a number of ranks that the engine cannot lay out."""
    if config.backend == "megatron":
        return
    if config.backend == "deepspeed":
        check_accumulation(config, dims)
    if config.optimizer in OF_LAYERS and spec.moe is not None:
        raise ConfigError(
            f"--optimizer {config.optimizer}: transformers keeps the experts of a layer in one tensor, which is no "
            "matrix: use adam, lion, adafactor or adamw_8bit"
        )
    if config.use_liger_kernel and spec.model_type not in LIGER_TYPES:
        raise ConfigError(
            f"--use_liger_kernel: not compared for {spec.model_type}, but for {', '.join(LIGER_TYPES)}: leave it out"
        )
    if config.recompute_granularity == "selective" and spec.model_type == "gpt_oss":
        raise ConfigError(
            "--recompute_granularity selective: transformers' gpt_oss writes into products of its experts, which are "
            "to be kept: use full"
        )
    size = config.fsdp_shard_size
    if size is not None and dims.world_size % size:
        raise LayoutError(
            f"--fsdp_shard_size {size} does not divide the {dims.world_size} ranks: it can be "
            f"{', '.join(map(str, divisors(dims.world_size)))}"
        )
    if config.quant_method is not None and spec.moe is not None:
        raise ConfigError(
            f"--quant_method {config.quant_method} with --backend {config.backend}: transformers stacks experts, which "
            "would stay whole: use --backend megatron"
        )
    for rope in spec.ropes:
        if rope.kind in ("longrope", "dynamic") and (dims.cp > 1 or config.packing):
            flag = f"--context_parallel_size {dims.cp}" if dims.cp > 1 else "--packing"
            raise LayoutError(
                f"--backend {config.backend} with {flag}: transformers chooses the frequencies of rope type "
                f"{rope.kind!r} by the largest position that a rank sees, not by each sequence: use --backend megatron"
            )
        longest = rope.original_max_position_embeddings
        if rope.kind == "dynamic" and config.row_length > longest:
            raise LayoutError(
                f"--max_length {config.row_length}: beyond {longest} positions the frequencies of rope type 'dynamic' "
                f"depend on what was computed before: use --max_length {longest}, or --rope_scaling yarn"
            )
    if spec.mtp_layers and not config.trains_adapter:
        raise ConfigError(
            f"--backend {config.backend}: transformers' model has none of the checkpoint's {len(spec.mtp_layers)} "
            "multi-token-prediction layers, and saving it would lose them: use --backend megatron, or --tuner_type lora"
        )


def shard_size(config: TrainConfig, world_size: int) -> int:
    """Ranks that share the parameters (not --backend megatron)."""
    zero = zero_of(config)
    whole = config.backend == "ddp" or (zero is not None and zero.stage < 3)
    return 1 if whole else config.fsdp_shard_size or world_size


def describe_layout(config: TrainConfig, dims: ParallelDims) -> str:
    """One line; of transformers models: 8 ranks = CP 2 x DP 4, parameters cut over 4 ranks, 2 copies."""
    if config.backend == "megatron":
        return dims.describe()
    zero = zero_of(config)
    size = shard_size(config, dims.world_size)
    context = f"CP {dims.cp} x " if dims.cp > 1 else ""
    cut = "parameters whole on each" if size == 1 else f"parameters cut over {size} ranks"
    if zero is not None:
        offloaded = {"none": "", "optimizer": ", its state in host memory", "all": ", all of it in host memory"}
        cut += f", DeepSpeed ZeRO-{zero.stage}{offloaded[zero.offload]}"
    copies = f", {dims.world_size // size} copies" if 1 < size < dims.world_size else ""
    return f"{dims.world_size} ranks = {context}DP {dims.dp}, transformers' model, {cut}{copies}"


def _is_given(config: TrainConfig, name: str) -> bool:
    field = type(config).__dataclass_fields__[name]
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return bool(getattr(config, name) != default)


def _shown(value: object) -> str:
    if isinstance(value, str):
        return value
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
