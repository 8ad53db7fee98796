"""What crosses ranks in one training step, by axis and kind of collective, from shapes alone. No torch.

Formulas of this runtime's collectives (full training, no recomputation); `mswift.parallel.traffic_counter` counts the
same in a running job, and a test holds the two equal. Shapes: S positions of a whole sequence, T tokens of a microbatch
on one rank before sequence parallelism cuts them, h hidden, d head dimension, e bytes of an element of the model.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from mswift.config.loss import LossFusion, is_fused, piece_tokens
from mswift.converters.spec import LayerSpec, ModelSpec
from mswift.topology import ParallelDims

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
GRADIENT_BYTES = 4
"""Gradients are summed in fp32 whatever the model's dtype is; so are losses, and gradients of keys round a ring."""

PADDING = 128
"""megatron-core's buffers of gradients are a multiple of this and of the data-parallel ranks."""


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over one axis in a step of one rank.

    num_bytes: of all calls together, each the whole tensor (what all_gather makes, what reduce_scatter starts from);
    send: what this rank sends. axis: tp, cp, pp, ep; "cp heads", inside the groups of a2a+p2p; dp, the replicas of
    dense parameters (CP ranks among them); edp, those of experts; embedding, the first and the last stage.
    """

    axis: str
    kind: Kind
    calls: int
    num_bytes: int

    def sent_bytes(self, ranks: int) -> float:
        """What one of `ranks` ranks sends, by the ring algorithms of NCCL (all_to_all: to everyone but itself)."""
        if self.kind == "send":
            return float(self.num_bytes)
        return self.num_bytes * (ranks - 1) / ranks * (2 if self.kind == "all_reduce" else 1)


@dataclass(frozen=True)
class StepShape:
    """Microbatches of one rank in a step, sequences in each, their padded length over all context-parallel ranks."""

    microbatches: int
    rows: int
    length: int
    dtype_bytes: int
    loss_fusion: LossFusion = "auto"
    cp_comm_type: str = "p2p"


def not_covered(spec: ModelSpec, dims: ParallelDims) -> str | None:
    """What the formulas leave out of this model or layout; None: nothing."""
    mixers = {spec.layer(n).mixer for n in range(spec.num_layers)}
    reasons = {
        "multi-head latent attention": spec.mla is not None,
        "recurrent layers": bool(mixers - {"attention", "none"}),
        "norms over all heads": spec.qk_norm == "width",
        "experts cut over ranks (expert_tensor_parallel_size above 1)": spec.moe is not None and dims.sizes["etp"] > 1,
    }
    return next((reason for reason, found in reasons.items() if found), None)


def step_traffic(
    spec: ModelSpec, dims: ParallelDims, shape: StepShape, pp_rank: int, dense: int, experts: int = 0
) -> list[Traffic]:
    """All collectives of a step of one rank of a pipeline stage; those of a few bytes (norms, counts) left out.

    dense, experts: trained elements of the rank. All-to-all of experts: as if they got equally many tokens (over all
    ranks it is exact). ValueError for what `not_covered` names.
    """
    if reason := not_covered(spec, dims):
        raise ValueError(f"no formula for {reason}")
    stage = _Stage(spec, dims, shape, pp_rank)
    found = [*stage.tensor(), *stage.context(), *stage.experts(), *stage.pipeline()]
    found += _replicas("dp", dense, dims.dp * dims.cp, shape.dtype_bytes)
    found += _replicas("edp", experts, dims.edp, shape.dtype_bytes)
    return _merged(found)


def sent_by_axis(traffic: Iterable[Traffic], dims: ParallelDims) -> Mapping[str, float]:
    """Bytes that the rank sends in the step over each axis."""
    sent: dict[str, float] = {}
    inner, outer = dims.cp_levels or (1, dims.cp)
    sizes = {**dims.sizes, "cp": outer, "cp heads": inner, "dp": dims.dp * dims.cp, "embedding": 2}
    for each in traffic:
        sent[each.axis] = sent.get(each.axis, 0.0) + each.sent_bytes(sizes[each.axis])
    return sent


def _replicas(axis: str, elements: int, ranks: int, dtype_bytes: int) -> Iterator[Traffic]:
    """The distributed optimizer: gradients are summed to their owners, updated weights come back."""
    if ranks > 1 and elements:
        padded = -(-elements // math.lcm(ranks, PADDING)) * math.lcm(ranks, PADDING)
        yield Traffic(axis, "reduce_scatter", 1, GRADIENT_BYTES * padded)
        yield Traffic(axis, "all_gather", 1, dtype_bytes * padded)


@dataclass(frozen=True)
class _Stage:
    """One rank of a pipeline stage."""

    spec: ModelSpec
    dims: ParallelDims
    shape: StepShape
    pp_rank: int

    @property
    def layers(self) -> list[LayerSpec]:
        return [self.spec.layer(n) for n in self.dims.held_layers(self.spec.num_layers, self.pp_rank)]

    @property
    def tokens(self) -> int:
        """T."""
        return self.shape.rows * self.shape.length // self.dims.cp

    @property
    def states(self) -> int:
        """Bytes of the hidden states of T tokens."""
        return self.tokens * self.spec.hidden_size * self.shape.dtype_bytes

    @property
    def is_last(self) -> bool:
        return self.pp_rank == self.dims.pp - 1

    def tensor(self) -> Iterator[Traffic]:
        """Inside the layers, at both ends of the model, and for gradients of what every rank has whole."""
        if self.dims.tp == 1:
            return
        blocks = sum(self._blocks(layer) for layer in self.layers)
        of_layers = {"all_gather": 3, "reduce_scatter": 2} if self.dims.sequence_parallel else {"all_reduce": 2}
        calls = {kind: number * blocks for kind, number in of_layers.items()}
        for kind, number in (*self._first().items(), *self._last().items()):
            calls[kind] = calls.get(kind, 0) + number
        m = self.shape.microbatches
        for kind, number in calls.items():
            if number:
                yield Traffic("tp", kind, m * number, m * number * self.states)  # type: ignore[arg-type]
        if self.is_last:
            pieces = self._pieces()
            yield Traffic("tp", "all_reduce", m * 2 * pieces, m * 3 * GRADIENT_BYTES * self.tokens)
        if replicated := self._replicated():
            yield Traffic("tp", "all_reduce", 1, GRADIENT_BYTES * replicated)

    def _blocks(self, layer: LayerSpec) -> int:
        """Pairs of a column-parallel and a row-parallel linear, between which the columns are cut."""
        shared = self.spec.moe is not None and self.spec.moe.shared_ffn_hidden_size > 0
        return (layer.mixer == "attention") + (layer.mlp == "dense" or (layer.mlp == "moe" and shared))

    def _first(self) -> dict[str, int]:
        """The embedding: a sum forward; cut in the sequence, the gradient is gathered."""
        if self.pp_rank:
            return {}
        return {"reduce_scatter": 1, "all_gather": 1} if self.dims.sequence_parallel else {"all_reduce": 1}

    def _last(self) -> dict[str, int]:
        """The output layer, alone or fused with the loss, which gathers its input once and in pieces."""
        if not self.is_last:
            return {}
        if not self.dims.sequence_parallel:
            return {"all_reduce": 1}
        return {"all_gather": 1 if self._fused else 2, "reduce_scatter": 1}

    @property
    def _fused(self) -> bool:
        return is_fused(self.shape.loss_fusion, self.tokens)

    def _pieces(self) -> int:
        if not self._fused:
            return 1
        parts = self.dims.tp if self.dims.sequence_parallel else 1
        size = max(piece_tokens(-(-self.spec.vocab_size // self.dims.tp)) // parts, 1)
        return -(-self.tokens // parts // size)

    def _replicated(self) -> int:
        """Elements whose gradients are summed over tensor-parallel ranks: norms, routers, biases of outputs.

        Without sequence parallelism only the norms of query and key heads, of which each rank has others.
        """
        spec = self.spec
        heads = 2 * spec.head_dim if spec.qk_norm == "head" else 0
        if not self.dims.sequence_parallel:
            return sum(heads for layer in self.layers if layer.mixer == "attention")
        vector = spec.hidden_size * (2 if spec.norm == "layer" else 1)
        norms, elements = spec.pre_norm + spec.post_norm, vector * self.is_last
        for layer in self.layers:
            if layer.mixer == "attention":
                elements += norms * vector + heads + spec.attention_out_bias * spec.hidden_size
            if layer.mlp != "none":
                elements += norms * vector + (layer.mlp == "dense" and spec.mlp_bias) * spec.hidden_size
            if layer.mlp == "moe" and spec.moe is not None:
                elements += spec.moe.num_experts * (spec.hidden_size + spec.moe.router_bias)
                elements += spec.moe.shared_gate * spec.hidden_size
        return elements

    def context(self) -> Iterator[Traffic]:
        """Attention of ranks that share a sequence, forward and backward."""
        if self.dims.cp == 1:
            return
        spec, e = self.spec, self.shape.dtype_bytes
        calls = self.shape.microbatches * sum(layer.mixer == "attention" for layer in self.layers)
        heads, groups = spec.num_attention_heads // self.dims.tp, spec.num_kv_heads // self.dims.tp
        keys = self.tokens * groups * 2 * spec.head_dim  # elements of keys and values of one rank
        inner, outer = self.dims.cp_levels or (1, self.dims.cp)
        if self.shape.cp_comm_type == "a2a":
            inner, outer = self.dims.cp, 1
        if inner > 1:
            elements = 2 * (keys + 2 * self.tokens * heads * spec.head_dim)
            axis = "cp" if outer == 1 else "cp heads"
            yield Traffic(axis, "all_to_all", 4 * calls, calls * elements * e)
        if self.shape.cp_comm_type == "all_gather":
            yield Traffic("cp", "all_gather", 2 * calls, 2 * calls * outer * keys * e)
            yield Traffic("cp", "reduce_scatter", calls, calls * outer * keys * GRADIENT_BYTES)
        elif outer > 1:
            passed = keys * (2 * (outer - 1) * e + outer * GRADIENT_BYTES)
            yield Traffic("cp", "send", (3 * outer - 2) * calls, calls * passed)

    def experts(self) -> Iterator[Traffic]:
        """Tokens on their way to their experts and back, forward and backward, each with its weight on the way out."""
        moe = self.spec.moe
        if self.dims.ep == 1 or moe is None:
            return
        calls = self.shape.microbatches * sum(layer.mlp == "moe" for layer in self.layers)
        share = self.dims.tp if self.dims.sequence_parallel else 1
        sent = self.tokens // share * moe.top_k
        elements = 4 * sent * self.spec.hidden_size * self.shape.dtype_bytes + 2 * sent * GRADIENT_BYTES
        yield Traffic("ep", "all_to_all", 6 * calls, calls * elements)
        yield Traffic("ep", "all_gather", calls, calls * self.dims.ep * moe.num_experts * 8)

    def pipeline(self) -> Iterator[Traffic]:
        """Hidden states to the chunk behind, their gradients to the one before; a tied embedding's gradient."""
        dims, m = self.dims, self.shape.microbatches
        if dims.pp == 1:
            return
        sends = m * (2 * dims.chunks - (self.pp_rank == 0) - self.is_last)
        yield Traffic("pp", "send", sends, sends * self.states // (dims.tp if dims.sequence_parallel else 1))
        if self.spec.tied_embeddings and (self.pp_rank == 0 or self.is_last):
            rows = -(-self.spec.vocab_size // dims.tp)
            yield Traffic("embedding", "all_reduce", 1, GRADIENT_BYTES * rows * self.spec.hidden_size)


def _merged(found: Iterable[Traffic]) -> list[Traffic]:
    """One entry for each axis and kind."""
    total: dict[tuple[str, Kind], tuple[int, int]] = {}
    for each in found:
        calls, num_bytes = total.get((each.axis, each.kind), (0, 0))
        total[each.axis, each.kind] = calls + each.calls, num_bytes + each.num_bytes
    return [Traffic(*key, *value) for key, value in total.items()]
