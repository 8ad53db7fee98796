"""What the engine cannot do of recomputation, packing, multi-token prediction, overlap, fusion, megatron-core's fields.

For `mswift.refusals`.
"""

import math
from collections.abc import Iterator

from mswift.config.mcore_fields import reason_on_cpu
from mswift.config.train import PtConfig, TrainConfig
from mswift.converters.spec import ModelSpec
from mswift.errors import ConfigError, LayoutError
from mswift.stages import Cut
from mswift.topology import ParallelDims

_RECOMPUTE = ("recompute_method", "recompute_num_layers", "recompute_modules")


def cut_of(config: TrainConfig) -> Cut:
    """What the flags say of the pipeline's stages."""
    return Cut(
        pp=config.pipeline_model_parallel_size,
        vpp=config.virtual_pipeline_model_parallel_size,
        layers_per_chunk=config.num_layers_per_virtual_pipeline_stage,
        first=config.decoder_first_pipeline_num_layers,
        last=config.decoder_last_pipeline_num_layers,
        layout=config.pipeline_model_parallel_layout,
    )


def engine_flag_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    """Those that the flags alone tell."""
    yield from _recompute_refusals(config)
    yield from packing_refusals(config)
    try:
        scale = config.mcore.get("mtp_loss_scaling_factor")
        check_prediction_flags(config.mtp_num_layers, config.trains_adapter, scale)
    except ConfigError as error:
        yield error
    if not config.use_distributed_optimizer:
        yield ConfigError(
            "--use_distributed_optimizer false: every data-parallel rank updates its own share of the weights, which "
            "gives the same numbers with less memory; leave it out"
        )
    if config.overlap_param_gather and not config.overlap_grad_reduce:
        yield ConfigError("--overlap_param_gather needs --overlap_grad_reduce: add --overlap_grad_reduce")
    if config.device == "cpu":
        if config.gradient_accumulation_fusion:
            yield ConfigError(
                "--gradient_accumulation_fusion is a CUDA kernel of apex, and this run computes on the CPU: "
                "leave it out"
            )
        reason = reason_on_cpu(config.mcore)
        if reason:
            yield ConfigError(reason)


def packing_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    """What --packing does not go with, as far as the flags tell."""
    if not config.packing:
        for name in ("packing_strategy", "packing_length"):
            value = getattr(config, name)
            if value != type(config).__dataclass_fields__[name].default:
                yield ConfigError(f"--{name} {value} has no effect without --packing: add --packing, or leave it out")
        return
    length = config.packing_length
    if config.packing_strategy == "concat-and-split":
        if not isinstance(config, PtConfig):
            yield ConfigError(
                "--packing_strategy concat-and-split cuts samples where a row ends, which is for pt: use "
                "--packing_strategy bestfit or sequential"
            )
        if length not in (None, config.max_length):
            yield ConfigError(
                f"--packing_length {length}: rows of --packing_strategy concat-and-split have --max_length "
                f"{config.max_length} positions: leave it out"
            )
    if length is not None and length < config.max_length:
        yield ConfigError(
            f"--packing_length {length} is below --max_length {config.max_length}, and no sample is cut to be packed: "
            f"use --packing_length {config.max_length} or more"
        )


def check_packing(config: TrainConfig, spec: ModelSpec) -> None:
    """LayoutError for a model whose layers cannot keep the samples of a row apart."""
    recurrent = recurrent_mixers(spec)
    if config.packing and recurrent:
        raise LayoutError(
            f"--packing: model_type {spec.model_type!r} has {' and '.join(recurrent)} layers, whose state would pass "
            "from each sample of a row to the next: leave it out"
        )


def recurrent_mixers(spec: ModelSpec) -> list[str]:
    """Kinds of layers in the model whose state passes from each position to the next."""
    return sorted({spec.layer(n).mixer for n in range(spec.num_layers)} & {"mamba", "delta"})


def _recompute_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    granularity, method, number = config.recompute_granularity, config.recompute_method, config.recompute_num_layers
    given = [f"--{name}" for name in _RECOMPUTE if getattr(config, name)]
    if granularity is None and given:
        kind = "selective" if config.recompute_modules else "full"
        yield ConfigError(
            f"{given[0]} has no effect without --recompute_granularity: add --recompute_granularity {kind}"
        )
    if granularity == "full":
        if config.recompute_modules:
            yield ConfigError(
                "--recompute_modules belongs to --recompute_granularity selective; full computes whole layers again: "
                "leave it out"
            )
        if method is None or number is None:
            yield ConfigError(
                "--recompute_granularity full needs --recompute_method and --recompute_num_layers: use "
                "--recompute_method uniform --recompute_num_layers 1"
            )
    if granularity == "selective" and (method is not None or number is not None):
        flag = "--recompute_method" if method is not None else "--recompute_num_layers"
        yield ConfigError(f"{flag} belongs to --recompute_granularity full: leave it out, or use full")


def check_recompute(config: TrainConfig, spec: ModelSpec, dims: ParallelDims) -> None:
    """LayoutError for layers that recompute_num_layers does not divide, and for modules that the model lacks."""
    number = config.recompute_num_layers
    if number is not None and config.recompute_method == "uniform":
        for depth in dims.cut(spec.num_layers):
            if depth % number:
                raise LayoutError(
                    f"--recompute_num_layers {number} does not divide a model chunk of {depth} layers, as "
                    "--recompute_method uniform needs: use --recompute_num_layers 1, or --recompute_method block"
                )
    layers = [spec.layer(n) for n in range(spec.num_layers)]
    mixers, mlps = {layer.mixer for layer in layers}, {layer.mlp for layer in layers}
    shared = spec.moe is not None and spec.moe.shared_ffn_hidden_size > 0
    has = {"core_attn": "attention" in mixers, "layernorm": spec.pre_norm, "mlp": "dense" in mlps, "moe": "moe" in mlps}
    for module in config.recompute_modules:
        if not (has | {"shared_experts": shared})[module]:
            raise LayoutError(f"--recompute_modules {module}: no layer of the model has one; leave it out")


def check_four_bit_base(lora: bool, dora: bool, method: str = "bnb") -> None:
    """ConfigError for what does not go with a base in four bits (`lora`: adapters are what is trained)."""
    if not lora:
        raise ConfigError(f"--quant_method {method} has no effect with --tuner_type full: use --tuner_type lora")
    if dora:
        raise ConfigError(
            f"--quant_method {method} with DoRA (--use_dora, or an adapter of --adapters that has it) is not "
            "supported: leave one of them out"
        )


def check_part(spec: ModelSpec) -> None:
    """ConfigError for a model of which megatron-core's engine trains no part."""
    if spec.moe is not None:
        raise ConfigError(
            "--freeze_parameters (and --tuner_type llamapro) of a model with experts: transformers' model stacks them, "
            "megatron-core's does not, so that a run could not change its engine: use --backend fsdp"
        )


def check_prediction(mtp_num_layers: int | None, spec: ModelSpec) -> None:
    """ConfigError unless the model has that many multi-token-prediction layers to train; 0 and None train none."""
    if not mtp_num_layers:
        return
    there = len(spec.mtp_layers)
    if mtp_num_layers != there:
        remedy = f"use --mtp_num_layers {there}" if there else "leave out --mtp_num_layers"
        raise ConfigError(
            f"--mtp_num_layers {mtp_num_layers}: --model (model_type {spec.model_type!r}) has {there} "
            f"multi-token-prediction layers with weights, and training adds none: {remedy}"
        )


def check_prediction_flags(mtp_num_layers: int | None, lora: bool, scale: float | None = None) -> None:
    """ConfigError for what does not go with training (or not) multi-token-prediction layers; `scale`: of their loss."""
    if lora and mtp_num_layers:
        raise ConfigError(
            f"--mtp_num_layers {mtp_num_layers} with --tuner_type lora: adapters are trained on the decoder's layers "
            "alone (transformers, which PEFT adapts, has no multi-token-prediction layers): leave out "
            "--mtp_num_layers, and these layers of --model stay as they are; or use --tuner_type full"
        )
    if scale is None:
        return
    if not mtp_num_layers:
        raise ConfigError(
            f"--mcore.mtp_loss_scaling_factor {scale:g} has no effect: no multi-token-prediction layers are trained "
            "without --mtp_num_layers: add --mtp_num_layers 1, or leave it out"
        )
    if not 0 < scale < math.inf:
        raise ConfigError(
            f"--mcore.mtp_loss_scaling_factor {scale:g} must be above 0: use --mcore.mtp_loss_scaling_factor 0.1"
        )


def check_microbatches(config: TrainConfig, dims: ParallelDims) -> None:
    """LayoutError where megatron-core's interleaved schedule cannot send the microbatches through in groups."""
    if dims.chunks == 1:
        return
    per_rank = config.global_batch_size // (config.micro_batch_size * dims.dp)
    group = config.mcore.get("microbatch_group_size_per_vp_stage") or dims.pp
    rest = per_rank % group
    if dims.pp <= group <= per_rank and not 0 < rest < dims.pp:
        return
    unit = config.micro_batch_size * dims.dp * dims.pp
    fitting = -(-config.global_batch_size // unit) * unit
    spelled = f" in groups of --mcore.microbatch_group_size_per_vp_stage {group}" if group != dims.pp else ""
    raise LayoutError(
        f"--global_batch_size {config.global_batch_size} gives each rank {per_rank} microbatches, which {dims.pp} "
        f"interleaved stages{spelled} cannot take: use --global_batch_size {fitting}"
        + (", and leave that field out" if spelled else "")
    )
