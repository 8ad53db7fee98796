"""Parameters and memory of one rank, from the table of the model and the layout alone. No torch, no model."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass

from mswift.config.loss import is_fused, piece_tokens
from mswift.config.optimizers import kept_by
from mswift.config.train import TrainConfig
from mswift.converters.megatron_tensor import MegatronTensor
from mswift.converters.plan import EMBEDDING, ModelTable
from mswift.converters.quantization import codes_of
from mswift.converters.rule import size_of
from mswift.converters.spec import ModelSpec
from mswift.refusals.backend import shard_size
from mswift.topology import ParallelDims
from mswift.train.trained import frozen_names, optimizer_bytes, part_of, trained_parameters, virtual_tokens

_LINEAR = re.compile(r"\.(linear_\w+|in_proj|out_proj)\.weight$")
_GRAD_BYTES = 4  # gradients are summed in fp32 whatever the weights are
_STATE_BYTES = {"adam": 8, "sgd": 4}  # fp32 moments of each parameter that megatron-core trains
_MASTER_BYTES = 4  # fp32 copy of a trained bf16 parameter

FSDP_WEIGHTS = (
    "fp32 where trained, divided by the ranks that share them, with two gathered layers and the ends of the model in "
    "the dtype of the run; gradients fp32 and the state of the optimizer, divided likewise"
)
ACTIVATIONS = (
    "microbatches in flight x tokens / CP x layers x (4h + 2(a + kv)d/TP + 4f/TP) x bytes, h/TP with SP; no recompute"
)
"""Shape letters: h hidden, a heads, kv KV heads, d head_dim, f ffn. Attention keeps no [seq, seq] scores (SDPA)."""


@dataclass(frozen=True)
class StageMemory:
    """One rank of a pipeline stage: elements of its parameters, and bytes by part."""

    parameters: int
    trained: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes


def four_bit_bytes(config: TrainConfig, table: ModelTable) -> float:
    """Of a weight with --quant_method: its code, its share of a scale (bnb: fp32, else 2 bytes) and of a zero (1)."""
    how = codes_of(table.config)
    if config.quant_method == "bnb" or how is None:
        return 1 / 2 + 4 / 64
    return 1 / 2 + (3 / how.group if how.group > 0 else 0)


def checkpoint_bytes(config: TrainConfig, table: ModelTable, dtype_bytes: int) -> int:
    """Of one checkpoint: what is trained (a LoRA run: its adapter), with the optimizer's fp32 state."""
    masters = _MASTER_BYTES * (dtype_bytes < _MASTER_BYTES)
    trained = trained_parameters(config, table)
    held = trained if config.trains_adapter else stage_parameters(table, ParallelDims(), 0)
    return held * dtype_bytes + trained * masters + optimizer_bytes(config, table)


def idle_parameters(table: ModelTable) -> int:
    """Elements of the experts that a token is not sent to."""
    moe = table.spec.moe
    if moe is None:
        return 0
    elements = sum(math.prod(tensor.shape) for tensor in table.megatron.values() if tensor.rule.experts)
    return elements // moe.num_experts * (moe.num_experts - moe.top_k)


def stage_parameters(
    table: ModelTable,
    dims: ParallelDims,
    pp_rank: int,
    *,
    experts_only: bool = False,
    linears_only: bool = False,
    num_ahead: int = 0,
    without: Set[str] = frozenset(),
) -> int:
    """Elements of one rank of a stage, rows of vocabulary padding included; a tied last stage has its own copy.

    So has one that trains `num_ahead` multi-token-prediction layers. linears_only: the weights of linears in layers;
    without: HF names of what is not counted.
    """
    layers = dims.held_layers(table.spec.num_layers, pp_rank)
    left = _left(table, without) if without else {}
    first, last = pp_rank == 0, pp_rank == dims.pp - 1
    elements = 0
    for key, tensor in table.megatron.items():
        if (experts_only and not tensor.rule.experts) or (linears_only and not _LINEAR.search(key)):
            continue
        mine = _local_elements(tensor, dims, table)
        if tensor.stacked:
            of_layer = mine // table.spec.num_layers
            elements += sum(math.ceil(of_layer * left.get((key, layer), 1)) for layer in layers)
            continue
        mine = math.ceil(mine * left.get((key, None), 1))
        if tensor.rule.in_layer:
            elements += mine * (tensor.layer in layers)
        elif key == EMBEDDING:
            elements += mine * (first or (last and (table.spec.tied_embeddings or num_ahead > 0)))
        elif last:
            elements += mine
    return elements


def _left(table: ModelTable, without: Set[str]) -> Mapping[tuple[str, int | None], float]:
    """(Megatron tensor, its layer where it holds all of them) -> the share that is of other HF tensors."""
    every, others = Counter[tuple[str, int | None]](), Counter[tuple[str, int | None]]()
    for name, pieces in table.hf_pieces.items():
        for piece in pieces:
            key = piece.names[1]
            place = key, piece.starts[1][0] if table.megatron[key].stacked else None
            size = math.prod(dim.size for dim in piece.dims)
            every[place] += size
            others[place] += size * (name not in without)
    return {place: others[place] / size for place, size in every.items()}


def _local_elements(tensor: MegatronTensor, dims: ParallelDims, table: ModelTable) -> int:
    """Elements of the tensor on one rank of a stage that holds all its layers; an uneven cut is padded."""
    tp, elements = dims.sizes["tp"], math.prod(tensor.shape)
    if tensor.rule.experts:
        tp, elements = dims.sizes["etp"], elements // dims.ep
    if tensor.rule.cut is None:
        return elements
    units = size_of(tensor.rule.cut.unit, table.sizes)
    return elements // units * -(-units // tp)


def stage_memory(
    config: TrainConfig, table: ModelTable, dims: ParallelDims, dtype_bytes: int, pp_rank: int
) -> StageMemory:
    """Estimate for one rank of a stage. LoRA: the adapters of the stage uncut, which is the most they can be."""
    ahead = config.mtp_num_layers or 0
    base = stage_parameters(table, dims, pp_rank, num_ahead=ahead)
    layers_share = len(dims.held_layers(table.spec.num_layers, pp_rank)) / table.spec.num_layers
    lora = config.trains_adapter
    learning = table if ahead else table.without_mtp()
    trained = math.ceil(trained_parameters(config, table) * layers_share)
    experts = 0
    if not lora:
        trained = stage_parameters(learning, dims, pp_rank, num_ahead=ahead)
        experts = stage_parameters(learning, dims, pp_rank, experts_only=True)
    if part_of(config, table) is not None:
        trained = stage_parameters(learning, dims, pp_rank, without=frozen_names(config, table))  # no experts
    parameters = base + trained * lora
    packed = stage_parameters(table, dims, pp_rank, linears_only=True) if config.quant_method else 0
    state = _STATE_BYTES[config.optimizer] + _MASTER_BYTES * (dtype_bytes < _MASTER_BYTES)
    return StageMemory(
        parameters=parameters,
        trained=trained,
        weights_bytes=math.ceil((parameters - packed) * dtype_bytes + packed * four_bit_bytes(config, table)),
        gradients_bytes=trained * _GRAD_BYTES,
        optimizer_bytes=math.ceil((trained - experts) * state / (dims.dp * dims.cp) + experts * state / dims.edp),
        activations_bytes=activations(config, table, dims, dtype_bytes, pp_rank),
    )


def fsdp_memory(config: TrainConfig, table: ModelTable, dims: ParallelDims, dtype_bytes: int) -> StageMemory:
    """Estimate for one rank of --backend fsdp or ddp."""
    parts = shard_size(config, dims.world_size)
    total = stage_parameters(table, ParallelDims(), 0)
    lora = config.trains_adapter
    trained = trained_parameters(config, table)
    per_layer = (total - end_parameters(table)) / table.spec.num_layers
    copied = parts > 1 or dtype_bytes < _GRAD_BYTES or config.fsdp_cpu_offload
    gathered = 2 * per_layer + end_parameters(table) if copied else 0.0
    on_device = not config.fsdp_cpu_offload
    held, learning, state = _held_by_all(config, table, dtype_bytes)
    if config.quant_method:
        packed = stage_parameters(table, ParallelDims(), 0, linears_only=True)
        held -= math.floor(packed * (dtype_bytes - four_bit_bytes(config, table)))
    holders = 1 if config.trains_adapter and not config.trains_lora else parts  # of what is trained
    weights = ((held - trained * _GRAD_BYTES) * holders + trained * _GRAD_BYTES * parts) / (parts * holders)
    return StageMemory(
        parameters=total + trained * lora,
        trained=trained,
        weights_bytes=math.ceil(on_device * weights + gathered * dtype_bytes),
        gradients_bytes=math.ceil(on_device * learning * _GRAD_BYTES / holders),
        optimizer_bytes=math.ceil(on_device * state / holders),
        activations_bytes=activations(config, table, dims, dtype_bytes, 0),
    )


def _held_by_all(config: TrainConfig, table: ModelTable, dtype_bytes: int) -> tuple[int, int, int]:
    """Of the ranks that share them: bytes of weights (fp32 where trained), elements with gradients, bytes of state."""
    total, trained = stage_parameters(table, ParallelDims(), 0), trained_parameters(config, table)
    frozen = total if config.trains_adapter else max(total - trained, 0)
    held = trained * _GRAD_BYTES + frozen * dtype_bytes
    if not config.lisa_activated_layers:
        return held, trained, optimizer_bytes(config, table)
    ends = end_parameters(table)
    learning = math.ceil(ends + config.lisa_activated_layers * (total - ends) / table.spec.num_layers)  # at a time
    return held, learning, learning * 4 * len(kept_by(config.optimizer, config.sgd_momentum))


def host_bytes(config: TrainConfig, table: ModelTable, dims: ParallelDims, dtype_bytes: int) -> int:
    """What one rank keeps in host memory with --fsdp_cpu_offload: weights, gradients, optimizer state."""
    held, learning, state = _held_by_all(config, table, dtype_bytes)
    return math.ceil((held + learning * _GRAD_BYTES + state) / shard_size(config, dims.world_size))


def end_parameters(table: ModelTable) -> int:
    """Elements of what is in no layer: embedding, last norm, output layer."""
    return sum(math.prod(t.shape) for t in table.megatron.values() if not (t.rule.in_layer or t.rule.in_mtp))


def activations(config: TrainConfig, table: ModelTable, dims: ParallelDims, dtype_bytes: int, pp_rank: int) -> int:
    """Bytes of what a rank of a stage keeps for the backward pass."""
    spec = table.spec
    tokens = -(-config.micro_batch_size * (config.row_length + virtual_tokens(config, table)) // dims.cp)
    in_flight = _in_flight(dims, config.global_batch_size // (config.micro_batch_size * dims.dp), pp_rank)
    hidden = 4 * spec.hidden_size / (dims.tp if dims.sequence_parallel else 1)
    attention = 2 * (spec.num_attention_heads + spec.num_kv_heads) * spec.head_dim / dims.tp
    layers = [*dims.held_layers(spec.num_layers, pp_rank)]
    if pp_rank == dims.pp - 1:
        layers += range(spec.num_layers, spec.num_layers + (config.mtp_num_layers or 0))
    elements = sum(hidden + attention + _mlp_activations(spec, dims, spec.layer(n).mlp) for n in layers)
    columns = -(-spec.vocab_size // dims.tp)
    whole = not is_fused(config.cross_entropy_loss_fusion, tokens)
    with_logits = (tokens if whole else min(tokens, piece_tokens(columns))) * (pp_rank == dims.pp - 1)
    logits = 2 * 4 * columns * with_logits  # fp32, and their gradient
    return math.ceil(tokens * in_flight * elements * dtype_bytes + logits)


def _in_flight(dims: ParallelDims, num_microbatches: int, pp_rank: int) -> float:
    """Microbatches whose activations a whole stage holds at the worst moment; interleaved, a chunk counts its share."""
    if dims.chunks == 1:
        return min(dims.pp - pp_rank, num_microbatches)
    passes = 2 * (dims.pp - pp_rank - 1) + (dims.chunks - 1) * dims.pp + 1  # of one microbatch through one chunk
    return min(passes / dims.chunks, num_microbatches)


def _mlp_activations(spec: ModelSpec, dims: ParallelDims, kind: str) -> float:
    """Elements a token; for experts its copies on the way out and back, and inside, spread evenly over them."""
    if kind == "none":
        return 0.0
    if spec.moe is None or kind == "dense":
        return 4 * spec.ffn_hidden_size / dims.tp
    sequence_share = dims.tp if dims.sequence_parallel else 1
    routed = spec.moe.top_k * (3 * spec.hidden_size + 4 * spec.moe.ffn_hidden_size) / sequence_share
    return routed + 4 * spec.moe.shared_ffn_hidden_size / dims.tp
