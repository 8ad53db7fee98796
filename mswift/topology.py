"""Where every rank sits: the degrees of parallelism and the arithmetic between ranks and coordinates. No torch.

*axis* is a mesh axis. Axes, from the fastest-varying rank digit to the slowest (megatron-core's order
tp-cp-dp-pp): **tp** shares each layer's matrices, **cp** shares each sequence, **dp** shares the batch,
**pp** shares the depth. Experts are laid over the same ranks: etp, ep, edp inside one pipeline stage.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from mswift.errors import LayoutError
from mswift.stages import check_stages

DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "edp", "pp")

FLAGS = {
    "tp": "--tensor_model_parallel_size",
    "cp": "--context_parallel_size",
    "pp": "--pipeline_model_parallel_size",
    "ep": "--expert_model_parallel_size",
    "etp": "--expert_tensor_parallel_size",
    "vpp": "--virtual_pipeline_model_parallel_size",
}


@dataclass(frozen=True, order=True)
class Coordinate:
    """Place of one rank on the dense mesh, each digit counted from 0."""

    tp: int = 0
    cp: int = 0
    dp: int = 0
    pp: int = 0


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of parallelism of one job; what is left of `world_size` after tp x cp x pp is data parallel.

    `etp` is the tensor-parallel size of experts (default: `tp`), `vpp` the model chunks per pipeline stage,
    `cp_levels` the sizes of context-parallel groups inside groups, the innermost first,
    `chunk_layers` the layers of each of the pp x vpp chunks in order (default: equal; `mswift.stages.cut_layers`).
    Raises LayoutError when the degrees do not fit each other.
    """

    world_size: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    vpp: int | None = None
    sequence_parallel: bool = False
    cp_levels: tuple[int, ...] | None = None
    chunk_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for axis, flag in FLAGS.items():
            size = getattr(self, axis)
            if size is not None and size < 1:
                raise LayoutError(f"{flag} {size}: a degree of parallelism is at least 1; use {flag} 1")
        if self.world_size < 1:
            raise LayoutError(f"--world_size {self.world_size}: a job has at least one rank; use --world_size 1")
        self._check_divides(("tp", "cp", "pp"))
        self._check_divides(("etp", "ep", "pp"))
        if self.sequence_parallel and self.tp == 1:
            raise LayoutError(
                f"--sequence_parallel true splits the sequence inside a tensor-parallel group, but {FLAGS['tp']} is 1: "
                f"use --sequence_parallel false, or {FLAGS['tp']} 2"
            )
        levels = self.cp_levels
        if levels is not None and (len(levels) != 2 or min(levels) < 1 or math.prod(levels) != self.cp):
            fitting = " or ".join(f"{inner} {self.cp // inner}" for inner in divisors(self.cp))
            raise LayoutError(
                f"--hierarchical_context_parallel_sizes {' '.join(map(str, levels))} are not two numbers whose "
                f"product is {FLAGS['cp']} {self.cp}: use --hierarchical_context_parallel_sizes {fitting}"
            )
        if self.vpp is not None and self.vpp > 1 and self.pp == 1:
            raise LayoutError(
                f"{FLAGS['vpp']} {self.vpp} cuts pipeline stages in chunks, but {FLAGS['pp']} is 1: "
                f"use {FLAGS['vpp']} 1, or {FLAGS['pp']} 2"
            )
        assert self.chunk_layers is None or len(self.chunk_layers) == self.pp * self.chunks, self.chunk_layers

    def _check_divides(self, axes: tuple[str, ...]) -> None:
        sizes = {axis: self.sizes[axis] for axis in axes}
        need = math.prod(sizes.values())
        if self.world_size % need == 0:
            return
        spelled = " x ".join(f"{FLAGS[axis]} {size}" for axis, size in sizes.items() if size > 1)
        below, above = self.world_size // need * need, -(-self.world_size // need) * need
        fitting = " or ".join(str(n) for n in (below, above) if n)
        total = f" = {need}" if " x " in spelled else ""
        raise LayoutError(
            f"{self.world_size} rank{'s' * (self.world_size > 1)} cannot be divided by {spelled}{total}: use {fitting} "
            f"ranks (--nproc_per_node, --world_size), or degrees whose product divides {self.world_size} "
            f"({', '.join(map(str, divisors(self.world_size)))})"
        )

    @property
    def dp(self) -> int:
        """Data-parallel size: replicas of the dense model, each with its own part of the batch."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Replicas of each expert."""
        return self.world_size // (self.sizes["etp"] * self.ep * self.pp)

    @property
    def has_expert_axes(self) -> bool:
        """Whether experts lie on the ranks otherwise than the dense layers."""
        return self.ep > 1 or self.sizes["etp"] != self.tp

    def describe(self) -> str:
        """One line: 8 ranks = TP 2 x PP 1 x DP 4, sequence parallel; experts ETP 1 x EP 4 x EDP 2."""
        context = f"CP {self.cp} x " if self.cp > 1 else ""
        text = f"{self.world_size} ranks = TP {self.tp} x {context}PP {self.pp} x DP {self.dp}"
        text += f" (VPP {self.vpp})" if self.chunks > 1 else ""
        text += ", sequence parallel" if self.sequence_parallel else ""
        if self.has_expert_axes:
            text += f"; experts ETP {self.sizes['etp']} x EP {self.ep} x EDP {self.edp}"
        return text

    @property
    def sizes(self) -> Mapping[str, int]:
        """Size of every axis by name."""
        etp = self.tp if self.etp is None else self.etp
        stage = self.world_size // self.pp
        return {
            **{"tp": self.tp, "cp": self.cp, "dp": stage // (self.tp * self.cp), "pp": self.pp},
            **{"etp": etp, "ep": self.ep, "edp": stage // (etp * self.ep)},
        }

    def coordinate(self, rank: int) -> Coordinate:
        """Dense coordinate of `rank`."""
        return Coordinate(**self._digits(DENSE_AXES, rank))

    def rank(self, coordinate: Coordinate) -> int:
        """Inverse of `coordinate`. ValueError for a place outside the mesh."""
        rank, stride = 0, 1
        for axis in DENSE_AXES:
            digit, size = getattr(coordinate, axis), self.sizes[axis]
            if not 0 <= digit < size:
                raise ValueError(f"{axis} {digit} lies outside 0..{size - 1}")
            rank, stride = rank + digit * stride, stride * size
        return rank

    def members(self, axis: str, rank: int) -> tuple[int, ...]:
        """Ranks of `rank`'s group on `axis`, ascending, which is also their order in the group.

        `axis` is a name or several joined by "-" ("dp-cp"), all of the dense mesh (tp cp dp pp) or all of the
        expert mesh (etp ep edp pp).
        """
        names = axis.split("-")
        mesh = next((mesh for mesh in (DENSE_AXES, EXPERT_AXES) if set(names) <= set(mesh)), None)
        if mesh is None:
            raise ValueError(f"{axis!r} is no axis of {DENSE_AXES} or of {EXPERT_AXES}")
        digits = self._digits(mesh, rank)
        strides, stride = {}, 1
        for name in mesh:
            strides[name], stride = stride, stride * self.sizes[name]
        base = sum(digits[name] * strides[name] for name in mesh if name not in names)
        steps = [[digit * strides[name] for digit in range(self.sizes[name])] for name in names]
        return tuple(sorted(base + sum(offsets) for offsets in product(*steps)))

    def _digits(self, mesh: tuple[str, ...], rank: int) -> dict[str, int]:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} lies outside 0..{self.world_size - 1}")
        digits = {}
        for axis in mesh:
            rank, digits[axis] = divmod(rank, self.sizes[axis])
        return digits

    @property
    def chunks(self) -> int:
        """Model chunks of each pipeline stage."""
        return self.vpp or 1

    def stage_layers(self, num_layers: int, pp_rank: int, vpp_rank: int = 0) -> range:
        """Layers of one pipeline stage (of one model chunk of it with vpp), counted from 0.

        Chunk c + 1 of stage 0 follows chunk c of the last stage. LayoutError when the layers do not divide.
        """
        if not (0 <= pp_rank < self.pp and 0 <= vpp_rank < self.chunks):
            raise ValueError(f"stage {pp_rank} chunk {vpp_rank} lies outside {self.pp} stages of {self.chunks} chunks")
        cut, number = self.cut(num_layers), vpp_rank * self.pp + pp_rank
        start = sum(cut[:number])
        return range(start, start + cut[number])

    def cut(self, num_layers: int) -> tuple[int, ...]:
        """Layers of every chunk, in the order in which they compute."""
        if self.chunk_layers is not None:
            assert sum(self.chunk_layers) == num_layers, (self.chunk_layers, num_layers)
            return self.chunk_layers
        check_stages(num_layers, self.pp, self.chunks)
        return (num_layers // (self.pp * self.chunks),) * (self.pp * self.chunks)

    def held_layers(self, num_layers: int, pp_rank: int) -> tuple[int, ...]:
        """All layers of a pipeline stage, those of its chunks one after the other."""
        return tuple(n for chunk in range(self.chunks) for n in self.stage_layers(num_layers, pp_rank, chunk))


def check_tensor_parallel(tp: int, units: Mapping[str, int]) -> None:
    """LayoutError unless every tensor-parallel rank gets whole units; names sizes that do.

    units: what must not be cut, by its name ("attention heads"), and how many of it the model has.
    """
    for unit, number in units.items():
        if number % tp:
            fitting = ", ".join(str(size) for size in divisors(math.gcd(*units.values())))
            raise LayoutError(f"{FLAGS['tp']} {tp} does not divide the model's {number} {unit}: it can be {fitting}")


def check_expert_parallel(ep: int, num_experts: int) -> None:
    """LayoutError unless every expert-parallel rank gets as many experts."""
    if num_experts % ep:
        fitting = ", ".join(map(str, divisors(num_experts)))
        raise LayoutError(f"{FLAGS['ep']} {ep} does not divide the model's {num_experts} experts: it can be {fitting}")


def check_expert_tensor_parallel(etp: int, columns: int) -> None:
    """LayoutError unless every expert-tensor-parallel rank gets as many columns of each expert."""
    if columns % etp:
        fitting = ", ".join(map(str, divisors(columns)))
        raise LayoutError(
            f"{FLAGS['etp']} {etp} does not divide the {columns} columns of an expert: it can be {fitting}"
        )


@dataclass(frozen=True)
class ExpertLayout:
    """What a layout must respect of a model's experts: how many, columns of each, whether they have biases."""

    num_experts: int
    columns: int
    has_bias: bool = False


def check_experts(dims: ParallelDims, experts: ExpertLayout | None) -> None:
    """LayoutError unless the layout computes this mixture of experts; None: a dense model."""
    etp = dims.sizes["etp"]
    if experts is None:
        for axis in ("ep", "etp"):
            size = getattr(dims, axis) or 1
            if size > 1:
                raise LayoutError(f"{FLAGS[axis]} {size}: the model has no experts; leave {FLAGS[axis]} out")
        return
    check_expert_parallel(dims.ep, experts.num_experts)
    check_expert_tensor_parallel(etp, experts.columns)
    if dims.tp > 1 and not dims.sequence_parallel:
        raise LayoutError(
            f"{FLAGS['tp']} {dims.tp} of a model with experts needs sequence parallelism, without which every one of "
            f"the {dims.tp} ranks would send all tokens to the experts: add --sequence_parallel true"
        )
    if experts.has_bias and etp > 1:
        raise LayoutError(
            f"{FLAGS['etp']} {etp} (default: {FLAGS['tp']}) cannot cut the model's experts, which have biases: "
            f"use {FLAGS['etp']} 1 (and {FLAGS['ep']} to share experts between ranks)"
        )


def divisors(number: int) -> list[int]:
    """Divisors of a positive number, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
