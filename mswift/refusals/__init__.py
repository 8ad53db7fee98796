"""Every "this does not fit" rule of a training run, as pure functions of configuration, model and number of ranks.

Dry run, launcher and ranks ask here, so they refuse alike. A message names the flag, both numbers and a value that
works. What only the data or the names of the model's modules can tell is refused where they are read.
"""

from dataclasses import replace
from typing import Any, Literal

from mswift.config.train import TrainConfig
from mswift.converters.spec import ModelSpec
from mswift.errors import ConfigError, LayoutError
from mswift.refusals.backend import check_backend, with_shared_sequences
from mswift.refusals.engine import (
    check_microbatches,
    check_packing,
    check_prediction,
    check_recompute,
    cut_of,
    recurrent_mixers,
)
from mswift.refusals.flags import flag_refusals
from mswift.refusals.tuner import check_tuner
from mswift.stages import cut_layers
from mswift.topology import FLAGS, ParallelDims, check_experts, check_tensor_parallel, divisors

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
    refusals = list(flag_refusals(config))
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
