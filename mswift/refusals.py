"""Every "this does not fit" rule of a training run, as pure functions of configuration, model and number of ranks.

Dry run, launcher and ranks ask here, so they refuse alike. A message names the flag, both numbers and a value that
works. What only the data or the names of the model's modules can tell is refused where they are read.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mswift.backend_refusals import HIDDEN_TUNERS, backend_refusals, check_backend, with_shared_sequences
from mswift.config.blend import parse_blend
from mswift.config.streaming import streaming_refusals
from mswift.config.train import PtConfig, TrainConfig
from mswift.converters.spec import ModelSpec
from mswift.engine_refusals import (
    check_four_bit_base,
    check_microbatches,
    check_packing,
    check_prediction,
    check_recompute,
    cut_of,
    engine_flag_refusals,
    recurrent_mixers,
)
from mswift.errors import ConfigError, LayoutError
from mswift.stages import cut_layers
from mswift.topology import FLAGS, ParallelDims, check_experts, check_tensor_parallel, divisors
from mswift.tuner_refusals import check_tuner, tuner_refusals

MIXTURE_SUFFIXES = (".yaml", ".yml")
_LORA_FLAGS = (
    *(
        "lora_rank",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "lora_dropout",
        "init_weights",
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
_INIT = re.compile(r"true|olora|pissa(_niter_[1-9][0-9]*)?")

COMPUTED: dict[str, tuple[Any, ...]] = {
    "dropout": (0.0,),
}
"""Fields of ModelSpec and the values with which training computes the model's function."""

COMPUTED_ACTIVATIONS = frozenset(
    {
        *(("silu", True), ("gelu", True), ("gelu_tanh", True), ("quick_gelu", True)),
        *(("gelu", False), ("gelu_tanh", False), ("relu2", False)),
    }
)
"""(`ModelSpec.activation`, `ModelSpec.gated`) that training computes (`mswift.parallel.activations`)."""

REMEDIES = {
    "dropout": ", and trained without dropout once its config.json says 0",
}


def check_train(config: TrainConfig, spec: ModelSpec, world_size: int) -> ParallelDims:
    """The layout of the run on `world_size` ranks. Raises the first of `train_refusals`."""
    for refusal in train_refusals(config, spec, world_size):
        raise refusal
    return dims_of(with_shared_sequences(config, spec), world_size, spec.num_layers)


def train_refusals(config: TrainConfig, spec: ModelSpec, world_size: int) -> list[ConfigError]:
    """Every reason not to start, the flags alone first, then the model, layout and batch."""
    refusals = list(_flag_refusals(config))
    config = with_shared_sequences(config, spec)
    try:
        check_computed(spec)
        check_prediction(config.mtp_num_layers, spec)
    except ConfigError as error:
        refusals.append(error)
    try:
        check_model_fits(config, spec)
        dims = dims_of(config, world_size, spec.num_layers)
        check_backend(config, spec, dims)
        check_tuner(config, spec)
        check_experts(dims, spec.expert_layout)
        check_context_parallel(dims, config.cp_comm_type, spec)
        check_recompute(config, spec, dims)
        check_packing(config, spec)
        check_batch(config, dims)
    except ConfigError as error:
        refusals.append(error)
    return refusals


def check_computed(spec: ModelSpec) -> None:
    """ConfigError for the first feature of the model that training does not compute; its conversion is not affected."""
    for name, values in COMPUTED.items():
        if getattr(spec, name) not in values:
            raise ConfigError(
                f"model_type {spec.model_type!r}: training does not compute {name} {getattr(spec, name)!r} yet; "
                f"the model can be converted{REMEDIES.get(name, '')}"
            )
    if spec.swiglu_limit is not None and spec.activation != "quick_gelu":
        raise ConfigError(
            f"model_type {spec.model_type!r}: training does not compute swiglu_limit {spec.swiglu_limit} of "
            f"activation {spec.activation!r} yet; the model can be converted"
        )
    if (spec.activation, spec.gated) not in COMPUTED_ACTIVATIONS:
        kind = "gated" if spec.gated else "without a gate"
        raise ConfigError(
            f"model_type {spec.model_type!r}: training does not compute activation {spec.activation!r} {kind} yet; "
            "the model can be converted"
        )


def dims_of(config: TrainConfig, world_size: int, num_layers: int) -> ParallelDims:
    """The layout that the flags ask for; LayoutError when the degrees do not fit the ranks or the layers."""
    dims = ParallelDims(
        world_size=world_size,
        tp=config.tensor_model_parallel_size,
        pp=config.pipeline_model_parallel_size,
        cp=config.context_parallel_size,
        cp_levels=config.hierarchical_context_parallel_sizes or None,
        ep=config.expert_model_parallel_size,
        etp=config.expert_tensor_parallel_size,
        sequence_parallel=config.sequence_parallel,
    )
    chunks = cut_layers(num_layers, cut_of(config))
    vpp = len(chunks) // dims.pp
    return replace(dims, vpp=vpp if vpp > 1 else None, chunk_layers=chunks if len(set(chunks)) > 1 else None)


def check_model_fits(config: TrainConfig, spec: ModelSpec) -> None:
    """LayoutError when tensor or pipeline parallelism would cut what cannot be cut."""
    if config.tensor_model_parallel_size >= 1:
        check_tensor_parallel(config.tensor_model_parallel_size, spec.tensor_parallel_units)
    if config.pipeline_model_parallel_size >= 1:
        cut_layers(spec.num_layers, cut_of(config))


def check_context_parallel(dims: ParallelDims, kind: str, spec: ModelSpec) -> None:
    """LayoutError unless ranks can share this model's sequences with this `cp_comm_type`."""
    if dims.cp == 1:
        return
    recurrent = recurrent_mixers(spec)
    if recurrent:
        raise LayoutError(
            f"{FLAGS['cp']} {dims.cp}: model_type {spec.model_type!r} has {' and '.join(recurrent)} layers, whose "
            f"state passes from each position to the next, so that ranks cannot share a sequence: use {FLAGS['cp']} 1"
        )
    if (dims.cp_levels is not None) != (kind == "a2a+p2p"):
        inner = divisors(dims.cp)[1]
        raise LayoutError(
            f"--cp_comm_type {kind} {'without' if dims.cp_levels is None else 'with'} "
            "--hierarchical_context_parallel_sizes, which a2a+p2p needs (ranks that exchange heads, such groups in a "
            f"ring) and the other kinds do not take: use --cp_comm_type a2a+p2p --hierarchical_context_parallel_sizes "
            f"{inner} {dims.cp // inner}, or --cp_comm_type p2p without them"
        )
    sharing = {"a2a": dims.cp, "a2a+p2p": (dims.cp_levels or (1,))[0]}.get(kind, 1)
    heads = spec.num_kv_heads if spec.mla is None else spec.num_attention_heads
    if heads // dims.tp % sharing:
        raise LayoutError(
            f"--cp_comm_type {kind} exchanges heads between {sharing} ranks, and of the model's {heads} key/value "
            f"heads (KV groups) {FLAGS['tp']} {dims.tp} leaves {heads // dims.tp}: use --cp_comm_type p2p or all_gather"
        )


def check_batch(config: TrainConfig, dims: ParallelDims) -> None:
    """LayoutError when the global batch is no whole number of microbatches on every data-parallel rank."""
    size, unit = config.global_batch_size, config.micro_batch_size * dims.dp
    if unit < 1 or size < 1:
        return
    if size % unit:
        fitting = [multiple for multiple in (size // unit * unit, -(-size // unit) * unit) if multiple]
        raise LayoutError(
            f"--global_batch_size {size} is not a multiple of --micro_batch_size {config.micro_batch_size} x "
            f"data-parallel size {dims.dp} = {unit}: use --global_batch_size {' or '.join(map(str, fitting))}"
        )
    check_microbatches(config, dims)


def train_dtype(config: TrainConfig, stored: str) -> Literal["F32", "BF16"]:
    """Dtype of the run; `stored` is that of the checkpoint ("F32", "BF16", "F16"). ConfigError for one that is not
    trained in."""
    match {"float32": "F32", "bfloat16": "BF16", None: stored}[config.torch_dtype]:
        case "F32":
            return "F32"
        case "BF16":
            return "BF16"
    raise ConfigError(
        f"--model {config.model} holds {stored} weights, and training computes in float32 or bfloat16: "
        "use --torch_dtype bfloat16 or float32"
    )


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
    wsd = config.lr_wsd_decay_iters
    if config.lr_decay_style == "WSD" and wsd is not None and warmup + wsd > decay:
        raise ConfigError(
            f"--lr_wsd_decay_iters {wsd} and --lr_warmup_iters {warmup} are longer than {length}: "
            f"use --lr_wsd_decay_iters {decay - warmup} or less"
        )


def _flag_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    yield from _range_refusals(config)
    yield from _length_refusals(config)
    yield from _tuner_refusals(config)
    yield from tuner_refusals(config)
    yield from engine_flag_refusals(config)
    yield from backend_refusals(config)
    if config.min_lr > config.lr:
        yield ConfigError(f"--min_lr {config.min_lr} is above --lr {config.lr}: use --min_lr {config.lr} or less")
    if config.lr_decay_style != "WSD" and config.lr_wsd_decay_iters is not None:
        yield ConfigError(
            f"--lr_wsd_decay_iters {config.lr_wsd_decay_iters} belongs to --lr_decay_style WSD, "
            f"not {config.lr_decay_style}: leave it out, or use --lr_decay_style WSD"
        )
    data_path = config.data_path if isinstance(config, PtConfig) else ()
    if data_path:
        yield from _data_path_refusals(config, data_path)
    elif not config.dataset:
        yield ConfigError("--dataset is required: give one file or more, as --dataset FILE#N for N of its rows")
    yield from _data_refusals(config)
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


def _start_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    """What --load_weights_only goes with."""
    if config.load_weights_only and config.resume_from_checkpoint is None:
        yield ConfigError("--load_weights_only needs the checkpoint: add --resume_from_checkpoint RUN/checkpoint-N")
    if config.load_weights_only and config.adapters:
        yield ConfigError(
            f"--adapters {config.adapters[0]} and --load_weights_only both bring an adapter: leave one out"
        )


def _data_path_refusals(config: TrainConfig, data_path: tuple[str, ...]) -> Iterator[ConfigError]:
    """Its documents are tokens already: there are no rows to choose, to name or to set apart."""
    given = f"--data_path {' '.join(data_path)}"
    if config.dataset:
        yield ConfigError(f"--dataset {' '.join(config.dataset)} and {given}: give one of them")
    if config.dataset_weights:
        yield ConfigError(
            "--dataset_weights is for --dataset; weights of --data_path stand before each prefix: 0.3 a 0.7 b"
        )
    if config.columns:
        yield ConfigError(f"--columns is for rows, {given} has none: leave it out")
    if config.split_dataset_ratio:
        yield ConfigError(
            f"--split_dataset_ratio {config.split_dataset_ratio:g} sets rows of --dataset apart, {given} has none: "
            "name text files with --val_dataset"
        )
    try:
        parse_blend(data_path)
    except ConfigError as error:
        yield error


def _data_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    weights, ratio = config.dataset_weights, config.split_dataset_ratio
    if weights and holds_mixture(config.dataset):
        yield ConfigError(
            f"--dataset_weights: --dataset {config.dataset[0]} has the weights of its sources; leave the flag out"
        )
    elif weights and len(weights) != len(config.dataset):
        yield ConfigError(
            f"--dataset_weights has {len(weights)} numbers for {len(config.dataset)} items of --dataset: give one each"
        )
    for weight in weights:
        if not 0 < weight < math.inf:
            yield ConfigError(
                f"--dataset_weights {weight:g}: a weight must be above 0; leave the item of --dataset out"
            )
    if not 0 <= ratio < 1:
        yield ConfigError(f"--split_dataset_ratio {ratio:g} must be from 0 to below 1: 0.01 sets apart one row in 100")
    if ratio and config.val_dataset:
        yield ConfigError(f"--split_dataset_ratio {ratio:g} and --val_dataset: give one of them")
    if config.eval_steps is not None and not config.val_dataset and not ratio:
        yield ConfigError(
            f"--eval_steps {config.eval_steps} has nothing to evaluate: add --val_dataset FILE or "
            "--split_dataset_ratio 0.01, or leave it out"
        )
    try:
        parse_columns(config.columns)
    except ConfigError as error:
        yield error


def holds_mixture(dataset: Sequence[str]) -> bool:
    """Whether an item of --dataset is a YAML file of sources (see `mswift.data.mixture`)."""
    return any(Path(item).suffix in MIXTURE_SUFFIXES for item in dataset)


def parse_columns(text: str | None) -> tuple[tuple[str, str], ...]:
    """--columns as (name in the file, name that is meant); ConfigError for anything but a JSON object of names."""
    if text is None:
        return ()
    try:
        value = json.loads(text)
    except ValueError as error:
        value = error
    if not (isinstance(value, dict) and value and all(isinstance(name, str) and name for name in value.values())):
        raise ConfigError(
            f'--columns {text}: it takes a JSON object of names: --columns \'{{"my_question": "query"}}\''
        )
    if len(set(value.values())) < len(value):
        raise ConfigError(f"--columns {text}: two columns cannot have one name; rename one of them")
    return tuple(value.items())


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
    if steps:
        try:
            check_schedule(config, steps)
        except ConfigError as error:
            yield error


def _quantised_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    if config.quant_method is None:
        for name in ("quant_bits", "bnb_4bit_quant_type"):
            value = getattr(config, name)
            if value != type(config).__dataclass_fields__[name].default:
                yield ConfigError(f"--{name} {value} has no effect without --quant_method bnb")
        return
    if config.quant_bits is None:
        yield ConfigError("--quant_method bnb needs the number of bits: --quant_bits 4")
    try:
        check_four_bit_base(config.trains_lora, config.use_dora)
    except ConfigError as error:
        yield error
    if config.init_weights != "true":
        yield ConfigError(
            f"--quant_method bnb with --init_weights {config.init_weights}, which starts from the whole weight, is not "
            "supported: leave one of them out"
        )


def _tuner_refusals(config: TrainConfig) -> Iterator[ConfigError]:
    if config.trains_lora:
        if not _INIT.fullmatch(config.init_weights):
            yield ConfigError(
                f"--init_weights {config.init_weights}: known: true pissa pissa_niter_N (as pissa_niter_16) olora"
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
        return
    if config.trains_adapter:
        if len(config.adapters) > 1:
            yield ConfigError(f"--adapters names {len(config.adapters)} adapters; training continues 1 adapter")
        if config.tuner_type not in HIDDEN_TUNERS:
            return
    for name in _LORA_FLAGS:
        value = getattr(config, name)
        if name == "adapters" and config.tuner_type in HIDDEN_TUNERS:
            continue
        if value != type(config).__dataclass_fields__[name].default:
            given = " ".join(value) if isinstance(value, tuple) else value
            yield ConfigError(
                f"--{name} {given} has no effect with --tuner_type {config.tuner_type}: use --tuner_type lora"
            )
