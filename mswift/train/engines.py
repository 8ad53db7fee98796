"""From the flat configuration to the engine of this rank; libraries of the other engine are not imported."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mswift.config.deepspeed import read_zero
from mswift.config.train import TrainConfig
from mswift.converters.adapters import NORM, expand_modules_to_save
from mswift.converters.plan import ModelTable
from mswift.converters.reader import WeightReader
from mswift.errors import ConfigError
from mswift.parallel.engine import AdapterSource, Engine
from mswift.parallel.four_bit import Kind
from mswift.parallel.held_codes import HeldCodes, held_codes
from mswift.refusals import train_dtype
from mswift.refusals.backend import shard_size
from mswift.topology import ParallelDims
from mswift.train.collective import ended_by
from mswift.train.hang import collective_timeout
from mswift.train.inputs import check_codes
from mswift.train.prompt_start import token_start
from mswift.train.trained import lora_config, part_of, saved_modules
from mswift.tuners.adapter import PeftAdapter
from mswift.tuners.lisa import LayerSampling
from mswift.tuners.method_adapter import OtherAdapter
from mswift.tuners.other_adapters import other_config
from mswift.tuners.prompts import PromptConfig
from mswift.tuners.xlora import XloraConfig
from mswift.tuners.xlora_adapter import XloraAdapter, XloraStart


@contextmanager
def built_engine(
    config: TrainConfig,
    reader: WeightReader,
    dims: ParallelDims,
    device: torch.device,
    num_steps: int,
    *,
    resumed: bool,
) -> Iterator[Engine]:
    """The model on this rank, with the weights of --model and --adapters; a resumed run brings its own.

    num_steps: of the run. Closed when the block ends.
    """
    adapter, start = _adapter(config, reader, num_steps, resumed=resumed)
    make = {"megatron": _megatron_engine, "deepspeed": _deepspeed_engine}.get(config.backend, _fsdp_engine)
    base = {"four_bit_base": _four_bit_base(config, reader)} if config.quant_method else {}
    engine = make(config, reader, dims, device, _shared(config, reader) | adapter | base)
    with ended_by(engine.close, dims):
        if not resumed or config.trains_adapter:
            engine.load_weights(reader, resumed=resumed)
        if start is not None and not resumed:
            engine.load_adapter(start)
        yield engine


def _shared(config: TrainConfig, reader: WeightReader) -> dict[str, Any]:
    """What all engines take, under the same names."""
    return {
        "dtype": train_dtype(config, reader.dtype),
        "cp_comm_type": config.cp_comm_type,
        "optimizer": config.optimizer,
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_eps": config.adam_eps,
        "sgd_momentum": config.sgd_momentum,
        "clip_grad": config.clip_grad,
        "seed": config.seed,
        "timeout_seconds": collective_timeout(config.distributed_timeout_minutes),
        "loss_fusion": config.cross_entropy_loss_fusion,
        "lora_b_lr_ratio": config.lorap_lr_ratio or 1.0,
        "part": part_of(config, reader.table),
        "neftune_alpha": config.neftune_noise_alpha,
    }


def _four_bit_base(config: TrainConfig, reader: WeightReader) -> Kind | HeldCodes:
    """What engines but DeepSpeed's take, where --quant_method is given."""
    if config.quant_method == "bnb":
        return config.bnb_4bit_quant_type
    check_codes(config, reader.config)
    return held_codes(reader)


def _megatron_engine(
    config: TrainConfig, reader: WeightReader, dims: ParallelDims, device: torch.device, shared: dict[str, Any]
) -> Engine:
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine

    own = EngineConfig(
        **shared,
        micro_batch_size=config.micro_batch_size,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        gradient_accumulation_fusion=config.gradient_accumulation_fusion,
        recompute_granularity=config.recompute_granularity,
        recompute_method=config.recompute_method,
        recompute_num_layers=config.recompute_num_layers,
        recompute_modules=config.recompute_modules,
        mtp_num_layers=config.mtp_num_layers or 0,
        mcore=config.mcore,
    )
    return MegatronEngine(reader.table, dims, own, device)


def _fsdp_engine(
    config: TrainConfig, reader: WeightReader, dims: ParallelDims, device: torch.device, shared: dict[str, Any]
) -> Engine:
    from mswift.parallel.fsdp.config import FsdpConfig
    from mswift.parallel.fsdp.engine import FsdpEngine

    own = FsdpConfig(
        **shared,
        **_of_transformers(config, reader.table),
        shard_size=shard_size(config, dims.world_size),
        reshard_after_forward=config.fsdp_reshard_after_forward,
        cpu_offload=config.fsdp_cpu_offload,
    )
    return FsdpEngine(reader.table, dims, own, device)


def _deepspeed_engine(
    config: TrainConfig, reader: WeightReader, dims: ParallelDims, device: torch.device, shared: dict[str, Any]
) -> Engine:
    from mswift.parallel.deepspeed.config import DeepspeedConfig
    from mswift.parallel.deepspeed.engine import DeepspeedEngine

    own = DeepspeedConfig(**shared, **_of_transformers(config, reader.table), zero=read_zero(config.deepspeed))
    return DeepspeedEngine(reader.table, dims, own, device)


def _of_transformers(config: TrainConfig, table: ModelTable) -> dict[str, Any]:
    """What engines of transformers models take (`mswift.parallel.fsdp.config.HfSettings`)."""
    again = 0
    if config.recompute_granularity == "full":
        every = config.recompute_method == "uniform"
        again = table.spec.num_layers if every else config.recompute_num_layers or 0
    elif config.recompute_granularity == "selective":
        again = table.spec.num_layers
    return {
        "recompute_blocks": again,
        "recompute_keeps_products": config.recompute_granularity == "selective",
        "compile_layers": config.torch_compile,
        "liger_kernels": config.use_liger_kernel,
        "lisa": lisa_of(config, table),
        "shifted_attention": config.tuner_type == "longlora",
        "muon_momentum": config.muon_momentum,
        "galore_rank": config.galore_rank,
        "galore_update_proj_gap": config.galore_update_proj_gap,
        "galore_scale": config.galore_scale,
        "galore_quantization": config.galore_quantization,
        "galore_proj_quant": config.galore_proj_quant,
        "galore_proj_bits": config.galore_proj_bits,
        "galore_proj_group_size": config.galore_proj_group_size,
        "galore_cos_threshold": config.galore_cos_threshold,
        "galore_gamma_proj": config.galore_gamma_proj,
        "galore_queue_size": config.galore_queue_size,
    }


def lisa_of(config: TrainConfig, table: ModelTable) -> LayerSampling | None:
    """Which layers of a full run are trained at a time; None: all."""
    active = config.lisa_activated_layers
    return LayerSampling(table.spec.num_layers, active, config.lisa_step_interval, config.seed) if active else None


def _adapter(
    config: TrainConfig, reader: WeightReader, num_steps: int, *, resumed: bool
) -> tuple[dict[str, Any], AdapterSource | None]:
    """(what is trained beside the frozen base, as engines take it; the adapter to continue, which keeps its own)."""
    if not config.trains_adapter:
        return {}, None
    saved = expand_modules_to_save(reader.table, saved_modules(config))
    if not config.trains_lora:
        if not config.adapters:
            method = other_config(config, reader.table, num_steps)
            begin: AdapterSource | None = None
            if isinstance(method, PromptConfig) and not resumed:
                begin = token_start(method, reader)
            if isinstance(method, XloraConfig) and not resumed:
                begin = XloraStart(reader.table, method, [Path(path) for path in config.xlora_adapters])
            return {"method": method, "trainable_modules": saved}, begin
        if config.tuner_type == "xlora":
            mixed = XloraAdapter(Path(config.adapters[0]), config.seed)
            return {"method": mixed.config, "trainable_modules": ()}, mixed
        start = OtherAdapter(Path(config.adapters[0]), reader.table.spec.num_layers, config.seed)
        return {"method": start.config, "trainable_modules": start.modules_to_save}, start
    if not config.adapters:
        return {"lora": lora_config(config, reader.table), "trainable_modules": saved}, None
    adapter = PeftAdapter(Path(config.adapters[0]))
    lora, modules = adapter.lora_config(reader.table, config.seed)
    if config.backend == "megatron" and NORM in modules:
        raise ConfigError(f"--adapters {config.adapters[0]} replaces norms (modules_to_save): use --backend fsdp")
    return {"lora": lora, "trainable_modules": modules}, adapter
