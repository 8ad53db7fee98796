"""The lines of `--dry_run`: name and text, in groups. No torch."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from mswift import rundir
from mswift.config.train import TrainConfig
from mswift.converters.plan import ModelTable
from mswift.refusals import train_dtype
from mswift.refusals.backend import describe_layout
from mswift.stages import describe_cut
from mswift.topology import ParallelDims
from mswift.train.inputs import blend_of, mixture_of
from mswift.train.memory import (
    ACTIVATIONS,
    FSDP_WEIGHTS,
    StageMemory,
    fsdp_memory,
    host_bytes,
    idle_parameters,
    stage_memory,
)
from mswift.train.prediction import prediction_line
from mswift.train.sent import sent_line
from mswift.train.tuning import tuner_line
from mswift.train.zero_memory import ZERO_WEIGHTS, zero_host_bytes, zero_memory
from mswift.tuners.methods import METHODS

Row = tuple[str, str]

DTYPE_BYTES = {"F32": 4, "BF16": 2}
_GROUPS_SHOWN = 4
_GIB, _MIB = 2**30, 2**20


def model_rows(
    config: TrainConfig, model: Path, table: ModelTable, left_out: int, *, has_weights: bool
) -> Iterator[Row]:
    """The model, and what of it is trained. left_out: multi-token-prediction layers that the run does without."""
    spec = table.spec
    yield (
        "model",
        f"{model}: {spec.model_type}, {spec.num_layers} layers, hidden {spec.hidden_size}, "
        f"{spec.num_attention_heads} heads, {spec.num_kv_heads} KV heads, ffn {spec.ffn_hidden_size}, "
        f"vocabulary {spec.vocab_size:,}{' (tied)' if spec.tied_embeddings else ''}",
    )
    total = sum(math.prod(tensor.shape) for tensor in table.megatron.values())
    active = total - idle_parameters(table)
    yield "parameters", f"{total:,}" + (f", of which {active:,} compute one token" if active < total else "")
    if spec.moe is not None:
        shared = f", a shared one of {spec.moe.shared_ffn_hidden_size}" if spec.moe.shared_ffn_hidden_size else ""
        yield (
            "experts",
            f"{spec.moe.num_experts} of width {spec.moe.ffn_hidden_size}, {spec.moe.top_k} for each token{shared}",
        )
    if predicted := prediction_line(config, len(spec.mtp_layers) + left_out):
        yield "mtp", predicted
    if not has_weights:
        yield "weights", "none here, so they are not checked; a launch needs them"
    if config.adapters and config.tuner_type != "xlora":
        yield "tuner", f"{config.tuner_type}, {config.adapters[0]} as it is"
    elif config.tuner_type in METHODS:
        fields = f" {config.tuner_config}" if config.tuner_config else ""
        yield "tuner", f"{config.tuner_type}{fields}, on {' '.join(config.target_modules)}"
    elif config.trains_lora:
        base = config.bnb_4bit_quant_type if config.quant_method == "bnb" else f"the codes of {config.quant_method}"
        yield (
            "tuner",
            f"{config.tuner_type}, rank {config.lora_rank}, alpha {config.lora_alpha:g}, on "
            + " ".join(config.target_modules)
            + (f"; base in 4 bits ({base})" if config.quant_method else ""),
        )
    else:
        yield "tuner", tuner_line(config, spec.num_layers) or config.tuner_type


def run_rows(config: TrainConfig) -> Iterator[Row]:
    """Data, schedule, output."""
    blend, mixture = blend_of(config), mixture_of(config)
    items = blend.prefixes or mixture.specs
    shares = [f"{weight:g} " for weight in blend.weights or mixture.weights]
    shares = shares or [f"{number:g} epochs of " for number in mixture.epochs] or [""] * len(items)
    yield "data", ", ".join(map("".join, zip(shares, items, strict=False))) or "none"
    split = f"{config.split_dataset_ratio:.3g} of the rows" if config.split_dataset_ratio else "none"
    yield "validation", ", ".join(config.val_dataset) or split
    iters, epochs = config.train_iters, config.num_train_epochs
    steps = f"{epochs or 'no'} epochs" if iters is None else f"{iters:,} steps"
    decay = f" to {config.min_lr:g} in {config.lr_decay_iters or 'all'} steps"
    yield (
        "schedule",
        f"{steps}; {config.optimizer}, lr {config.lr:g}, {config.lr_warmup_iters} warm-up steps, "
        f"{config.lr_decay_style}{decay if config.lr_decay_style != 'constant' else ''}",
    )
    steps_done = rundir.committed_steps(Path(config.output_dir))
    start = f"continues checkpoint-{steps_done[-1]}" if steps_done else "starts"
    if config.resume_from_checkpoint and not steps_done:
        what = "the weights of " if config.load_weights_only else ""
        start = f"starts from {what}{config.resume_from_checkpoint}"
    every = f"every {config.save_steps} steps and at the end" if config.save_steps else "at the end"
    yield "output", f"{config.output_dir} ({start}; --resume {config.resume}), saved {every}"


def layout_rows(config: TrainConfig, dims: ParallelDims, num_layers: int) -> Iterator[Row]:
    """Which ranks share what."""
    yield "layout", describe_layout(config, dims)
    kind = config.cp_comm_type
    experts = {"etp": "share each expert", "ep": "share the experts"} if dims.has_expert_axes else {}
    axes = {
        "tp": "share each layer",
        "cp": f"share each sequence ({kind})",
        "pp": "are the stages of a pipeline",
        "dp": "share the batch",
    } | experts
    for axis, what in axes.items():
        if dims.sizes[axis] > 1:
            yield f"  {axis.upper()} groups", f"{_groups(dims, axis)} {what}"
    if dims.pp > 1:
        for stage, held in enumerate(describe_cut(dims.cut(num_layers), dims.pp)):
            yield f"  stage {stage}", held


def _groups(dims: ParallelDims, axis: str) -> str:
    """The first groups of an axis, as [0 1] [2 3] ..."""
    seen: dict[tuple[int, ...], None] = {}
    for rank in range(dims.world_size):
        seen[dims.members(axis, rank)] = None
        if len(seen) > _GROUPS_SHOWN:
            break
    shown = [f"[{_ranks(group)}]" for group in list(seen)[:_GROUPS_SHOWN]]
    return " ".join(shown) + (" ..." if len(seen) > _GROUPS_SHOWN else "")


def _ranks(group: Sequence[int]) -> str:
    return " ".join(map(str, group)) if len(group) <= 8 else f"{group[0]} {group[1]} ... {group[-1]}"


def batch_rows(config: TrainConfig, dims: ParallelDims, virtual: int = 0) -> Iterator[Row]:
    """A step's samples and tokens; virtual: tokens that the tuner puts before each sample."""
    num_microbatches = config.global_batch_size // (config.micro_batch_size * dims.dp)
    yield (
        "batch",
        f"{config.global_batch_size} {'packs' if config.packing else 'samples'} a step = {num_microbatches} "
        f"microbatches x {config.micro_batch_size} x DP {dims.dp}; at most "
        f"{config.global_batch_size * config.row_length:,} tokens a step",
    )
    if virtual:
        counted = "memory counts one sample in a pack" if config.packing else "memory counts them"
        yield "  virtual", f"{virtual} tokens before each sample, which --max_length does not count; {counted}"
    if dims.pp > 1:
        idle = (dims.pp - 1) / (num_microbatches * dims.chunks + dims.pp - 1)
        kind = "1F1B" if dims.chunks == 1 else f"interleaved 1F1B of {dims.chunks} chunks a stage"
        yield "  pipeline", f"{kind}, {idle:.0%} of the time idle with {num_microbatches} microbatches"


def memory_rows(config: TrainConfig, table: ModelTable, stored: str, dims: ParallelDims) -> Iterator[Row]:
    """Memory of a rank, estimated, and what it sends."""
    dtype = train_dtype(config, stored)
    dtype_bytes = DTYPE_BYTES[dtype]
    if config.backend == "deepspeed":
        yield "memory", f"{dtype}, of one rank, estimated:\n{_table([zero_memory(config, table, dims, dtype_bytes)])}"
        yield "  weights", ZERO_WEIGHTS
        if in_host := zero_host_bytes(config, table, dims, dtype_bytes):
            yield "  host", f"{_size(in_host)} of a rank (--deepspeed {config.deepspeed})"
        yield "  activations", ACTIVATIONS
        return
    if config.backend != "megatron":
        yield "memory", f"{dtype}, of one rank, estimated:\n{_table([fsdp_memory(config, table, dims, dtype_bytes)])}"
        yield "  weights", FSDP_WEIGHTS
        if config.fsdp_cpu_offload:
            held = _size(host_bytes(config, table, dims, dtype_bytes))
            yield "  host", f"{held} of weights, gradients and optimizer state of a rank (--fsdp_cpu_offload)"
        yield "  activations", ACTIVATIONS
        return
    stages = [stage_memory(config, table, dims, dtype_bytes, stage) for stage in range(dims.pp)]
    yield "memory", f"{dtype}, of one rank, estimated:\n{_table(stages)}"
    yield (
        "  weights",
        "with vocabulary padding; gradients fp32; optimizer fp32, divided by DP" + (" x CP" if dims.cp > 1 else ""),
    )
    yield "  activations", ACTIVATIONS
    if dims.world_size > 1:
        yield "sent", sent_line(config, table, dims, dtype_bytes)


def _table(stages: Sequence[StageMemory]) -> str:
    head = ("stage", "parameters", "trained", "weights", "gradients", "optimizer", "activations", "total")
    lines = ["".join(f"{name:>15}" for name in head)]
    for number, stage in enumerate(stages):
        parts = (stage.weights_bytes, stage.gradients_bytes, stage.optimizer_bytes, stage.activations_bytes)
        cells = (number, f"{stage.parameters:,}", f"{stage.trained:,}", *map(_size, parts), _size(stage.total_bytes))
        lines.append("".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB else f"{num_bytes / _MIB:.2f} MiB"
