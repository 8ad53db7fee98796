"""From the flat configuration to the parts of a run; each part gets its own small configuration."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mswift.config.blend import Blend
from mswift.config.train import SftConfig, TrainConfig
from mswift.converters.reader import WeightReader
from mswift.converters.spec import ModelSpec
from mswift.data.cache import cache_root
from mswift.data.chat_template import use_chat_template
from mswift.data.dataset import DataOptions, Kind, TokenDataset, build_dataset
from mswift.data.flags import data_options
from mswift.data.indexed_dataset import build_indexed
from mswift.data.mixture import read_mixture
from mswift.data.packed import PackedDataset, Stored
from mswift.data.samples import Cut, CutKind
from mswift.data.selection import Selection
from mswift.data.stream import StreamDataset, num_samples
from mswift.data.tokenizer import Tokenizer, add_special_tokens, late_tokenizer, pad_token_id
from mswift.errors import ConfigError
from mswift.launchers.environment import RankInfo
from mswift.parallel.batch import document_multiple, sequence_multiple
from mswift.refusals.backend import describe_layout
from mswift.refusals.flags import check_schedule, wsd_decay_iters
from mswift.stages import describe_cut
from mswift.topology import ParallelDims
from mswift.train.batches import BatchPlan
from mswift.train.collective import from_writer, patient_barrier
from mswift.train.inputs import blend_of
from mswift.train.new_tokens import RULE, GrownReader
from mswift.train.prediction import prediction_line
from mswift.train.prompt_start import num_virtual_tokens
from mswift.train.run import Start
from mswift.train.schedule import LearningRate
from mswift.train.streaming import training_stream
from mswift.train.tuning import tuner_line


def build_data(
    kind: Kind, config: TrainConfig, reader: WeightReader, info: RankInfo, *, resumed: bool
) -> tuple[Stored | StreamDataset, Stored | None, Tokenizer]:
    """Training data, validation data (or None) and the tokenizer; tokenised once per node, then shared.

    With --packing each rank finds the packs itself, the same ones. A stream has not started.
    """
    tokenizer = late_tokenizer(reader.hf_files, cache_root(config.cache_dir))
    if isinstance(reader, GrownReader):
        add_special_tokens(tokenizer, reader.tokens.names, reader.tokens.first_id)
    use_chat_template(tokenizer, config.chat_template, chosen_before=resumed and not config.trains_adapter)
    sources = read_mixture(config.dataset, config.dataset_weights)
    virtual = num_virtual_tokens(config, reader.table)
    positions = reader.table.spec.max_position_embeddings - virtual
    options = data_options(kind, config)
    options = replace(
        options, model_positions=positions, weights=sources.weights, epochs=sources.epochs, cut=_cut(kind, config)
    )
    is_writer = info.local_rank == 0

    def build(flag: str, specs: tuple[str, ...], options: DataOptions) -> TokenDataset:
        return build_dataset(
            kind, specs, tokenizer, options, is_writer=is_writer, barrier=patient_barrier, progress=info.rank == 0,
            flag=flag, hand_over=lambda path: from_writer(path, is_writer),
        )  # fmt: skip

    def build_blend(blend: Blend) -> TokenDataset:
        return build_indexed(
            blend, tokenizer, cut=Cut(config.max_length, options.cut), seed=config.seed,
            vocab_size=reader.table.spec.vocab_size, cache_dir=config.cache_dir, is_writer=is_writer,
            barrier=patient_barrier, hand_over=lambda path: from_writer(path, is_writer),
        )  # fmt: skip

    blend, val_data = blend_of(config), None
    data: TokenDataset | StreamDataset
    if config.streaming:
        check = partial(_check_fits, "--dataset", spec=reader.table.spec, tokenizer=tokenizer, virtual=virtual)
        data = training_stream(kind, config, sources.specs, info, tokenizer, options, check)
    else:
        data = build_blend(blend) if blend.prefixes else build("--dataset", sources.specs, options)
    if options.loss_scale.by_channel and not data.channel_names:
        raise ConfigError("--enable_channel_loss: no row of --dataset has a `channel`; leave the flag out")
    watched = replace(
        options, weights=(), epochs=(), by_source=True, loss_scale=replace(options.loss_scale, by_channel=False)
    )
    if config.split_dataset_ratio:
        apart = replace(watched, selection=replace(options.selection, part="validation"))
        val_data = build("--dataset", sources.specs, apart)
    elif config.val_dataset:
        val_data = build("--val_dataset", config.val_dataset, replace(watched, selection=Selection()))
    for flag, some in (("--data_path" if blend.prefixes else "--dataset", data), ("--val_dataset", val_data)):
        if isinstance(some, TokenDataset):
            _check_fits(flag, some, reader.table.spec, tokenizer, virtual)
    if config.packing:
        length, strategy = config.row_length, config.packing_strategy
        packed_val = None if val_data is None else PackedDataset(val_data, length, strategy)
        packed = PackedDataset(data, length, strategy) if isinstance(data, TokenDataset) else data
        return packed, packed_val, tokenizer
    return data, val_data, tokenizer


def _cut(kind: Kind, config: TrainConfig) -> CutKind:
    """What becomes of documents."""
    if kind != "pt" or not config.packing:
        return "joined"
    return "rows" if config.packing_strategy == "concat-and-split" else "documents"


def _check_fits(flag: str, data: TokenDataset, spec: ModelSpec, tokenizer: Tokenizer, virtual: int = 0) -> None:
    """ConfigError for samples that the model has no rows or positions for. virtual: tokens before each."""
    token, longest = data.largest_token, int(data.lengths.max())
    if token >= spec.vocab_size:
        raise ConfigError(
            f"{flag}: the tokenizer of --model writes token {tokenizer.convert_ids_to_tokens(token)!r} (id {token}), "
            f"the model has {spec.vocab_size} rows (vocab_size): use the tokenizer that the model was trained with, or "
            f"give the model {len(tokenizer)} rows (transformers: model.resize_token_embeddings({len(tokenizer)}))"
        )
    if virtual and longest + virtual > spec.max_position_embeddings:
        raise ConfigError(
            f"{flag}: a sample has {longest} tokens and {virtual} virtual ones before them, the model has "
            f"{spec.max_position_embeddings} positions (max_position_embeddings): pass --max_length "
            f"{spec.max_position_embeddings - virtual}"
        )
    if longest > spec.max_position_embeddings:
        raise ConfigError(
            f"{flag}: a sample has {longest} tokens, the model has {spec.max_position_embeddings} positions "
            f"(max_position_embeddings; --rope_scaling yarn --max_model_len {longest} trains it for more); pass "
            f"--max_length {spec.max_position_embeddings}"
        )


def batch_plan(config: TrainConfig, dims: ParallelDims, rank: int, tokenizer: Tokenizer, vocab_size: int) -> BatchPlan:
    """Batch arithmetic of this rank; a length is a multiple of 8 and of what the layout cuts it into."""
    pad = pad_token_id(tokenizer)
    return BatchPlan(
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.global_batch_size,
        dp_rank=dims.coordinate(rank).dp,
        dp_size=dims.dp,
        seq_multiple=math.lcm(8, sequence_multiple(dims)),
        pad_token_id=pad if pad < vocab_size else 0,  # never a target, and behind every real token
        document_multiple=document_multiple(dims),
        microbatch_multiple=sequence_multiple(dims),
        one_length=dims.pp > 1,
        per_sample=config.loss_normalization == "sample",
    )


def num_steps(config: TrainConfig, held: int) -> int:
    """Optimizer steps of the run; the last epoch is rounded up to whole batches. `held`: samples, 0 of a stream."""
    if config.train_iters is not None:
        return config.train_iters
    assert config.num_train_epochs is not None  # refused before
    steps = math.ceil(held * config.num_train_epochs / config.global_batch_size)
    check_schedule(config, steps)
    return steps


def learning_rate(config: TrainConfig, steps: int) -> LearningRate:
    """The schedule; what is not given follows from the length of the run."""
    decay_iters = config.lr_decay_iters or steps
    return LearningRate(
        peak=config.lr,
        floor=config.min_lr,
        style=config.lr_decay_style,
        warmup_iters=config.lr_warmup_iters,
        decay_iters=decay_iters,
        wsd_decay_iters=wsd_decay_iters(config, decay_iters),
        wsd_decay_style=config.lr_wsd_decay_style,
    )


def _token_lines(reader: WeightReader) -> dict[str, str]:
    """Which tokens are new, and the rule by which their rows start."""
    if not isinstance(reader, GrownReader):
        return {}
    tokens = reader.tokens
    ids = f"ids {tokens.first_id} to {tokens.end - 1} of {reader.table.spec.vocab_size} rows"
    return {"new tokens": f"{' '.join(tokens.names)} ({ids}); their rows start as {RULE}"}


def _stage_lines(dims: ParallelDims, num_layers: int) -> dict[str, str]:
    """What each stage of an uneven or interleaved pipeline holds."""
    if dims.chunks == 1 and dims.chunk_layers is None:
        return {}
    return {f"  stage {n}": held for n, held in enumerate(describe_cut(dims.cut(num_layers), dims.pp))}


def steps_line(config: TrainConfig, held: int, steps: int) -> str:
    """How many, and whether a step has samples more than once. `held`: samples of an epoch, 0 of a stream."""
    size, what = config.global_batch_size, "packs" if config.packing else "samples"
    if not held or held >= size:
        return f"{steps}"
    return (
        f"{steps}, {steps * size / held:.3g} epochs: a step takes {size} {what} and the data has {held}, so that "
        f"a step has them more than once; --global_batch_size {held} (or less) would not"
    )


def _loss_line(config: TrainConfig, data: Stored | StreamDataset) -> str:
    """What the loss is."""
    what = {"token": "tokens of a global batch", "sample": "samples of a global batch, of each over its tokens"}
    parts = [f"mean over the {what[config.loss_normalization]}, by loss weights"]
    if isinstance(config, SftConfig):
        parts.append(f"--loss_scale {config.loss_scale}")
    if names := [name for name in data.channel_names if name]:
        parts.append(f"apart for {', '.join(names)}")
    return "; ".join(parts)


def print_banner(
    start: Start,
    device: torch.device,
    dtype: str,
    parameters: tuple[int, int],
    held: Sequence[str],
    data: Stored | StreamDataset,
    val_data: Stored | None,
    last_step: int,
) -> None:
    """Say what will happen before it does. `parameters`: (of the model, trained); `held`: bytes of either kind."""
    config, dims = start.config, start.dims
    per_rank = config.global_batch_size // (config.micro_batch_size * dims.dp)
    reader = start.reader
    predicted = prediction_line(config, len(reader.table.spec.mtp_layers) + reader.num_left_out)
    tuned = tuner_line(config, reader.table.spec.num_layers)
    microbatches = f"{per_rank} microbatches x {config.micro_batch_size} x DP {dims.dp}"
    lines = {
        "command": f"{start.kind}, {config.tuner_type}, {dtype} on {device}",
        "model": f"{Path(config.model)} ({parameters[0]:,} parameters, {parameters[1]:,} trained)",
        "parameters": "; ".join(held),
        **({"tuner": tuned} if tuned else {}),
        **({"mtp": predicted} if predicted else {}),
        **_token_lines(reader),
        "layout": describe_layout(config, dims),
        **_stage_lines(dims, reader.table.spec.num_layers),
        "batch": f"{config.global_batch_size} {'packs' if config.packing else 'samples'} = {microbatches}",
        "loss": _loss_line(config, data),
        "data": data.summary,
        "validation": val_data.summary if val_data else "none",
        "steps": steps_line(config, num_samples(data), last_step)
        + (f", continuing after step {start.resume.step}" if start.resume else ""),
        "output": str(Path(config.output_dir)),
    }
    print("\n".join(f"{name:11s}{text}" for name, text in lines.items()), flush=True)
