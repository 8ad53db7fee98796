"""Update rules of `--optimizer`: which one a tensor has, and what it keeps between steps. No torch.

An elementwise rule keeps tensors like the parameter, which lie where its rows lie. The others need a matrix as a whole
and keep what `state_of` says.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol

OptimizerName = Literal["adam", "sgd", "lion", "adafactor", "adamw_8bit", "muon", "galore", "apollo"]

ELEMENTWISE = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",), "lion": ("exp_avg",)}
"""Names of a rule's fp32 tensors, each shaped like the parameter."""

OF_MEGATRON = ("adam", "sgd")
"""Those that megatron-core's optimizer has too."""

OF_LAYERS = ("muon", "galore", "apollo")
"""Rules of the matrices of layers alone; embedding, output layer and vectors have adam beside them."""

LOW_RANK = ("galore", "apollo")
"""Rules that keep their moments of `galore_rank` rows or columns."""

QUANTIZED = "q_galore"
"""The rule that --galore_quantization makes of galore."""

OF_QUANTIZED = (
    *("galore_proj_quant", "galore_proj_bits", "galore_proj_group_size"),
    *("galore_cos_threshold", "galore_gamma_proj", "galore_queue_size"),
)
"""Flags of that rule alone."""

LOW_RANK_STATE = ("galore_rank", "galore_quantization", *OF_QUANTIZED[:3], "galore_queue_size")
"""Flags on which the shapes of saved state depend."""

LIBRARIES = {
    "adamw_8bit": "bitsandbytes",
    "galore": "galore_torch",
    QUANTIZED: "bitsandbytes",
    "apollo": "apollo_torch",
}
"""What has to be installed (pip install 'mswift[optim]')."""

_BLOCK, _SMALLEST = 256, 4096  # of bitsandbytes: elements with a common scale, and of a tensor that is kept in 8 bits
_BYTES = {"F32": 4, "U8": 1}

State = dict[str, tuple[tuple[int, ...], str]]
"""Name -> (shape, dtype)."""


class GaLoreFlags(Protocol):
    """Flags of `mswift.config.train.TrainConfig`, which engines' settings have under the same names."""

    @property
    def galore_rank(self) -> int: ...
    @property
    def galore_quantization(self) -> bool: ...
    @property
    def galore_proj_quant(self) -> bool: ...
    @property
    def galore_proj_bits(self) -> int: ...
    @property
    def galore_proj_group_size(self) -> int: ...
    @property
    def galore_queue_size(self) -> int: ...


@dataclass(frozen=True)
class LowRank:
    """What rules of projected gradients keep. bits: of an element of the projection, 32: as it is; group: elements of
    it with one scale; queue: similarities of projections that are remembered."""

    rank: int
    quantized: bool = False
    bits: int = 32
    group: int = 256
    queue: int = 5

    @classmethod
    def of(cls, flags: GaLoreFlags) -> "LowRank":
        """That of a run."""
        bits = flags.galore_proj_bits if flags.galore_proj_quant else 32
        group, queue = flags.galore_proj_group_size, flags.galore_queue_size
        return cls(flags.galore_rank, flags.galore_quantization, bits, group, queue)


def kept_by(rule: str, sgd_momentum: float) -> tuple[str, ...]:
    """Those tensors of an elementwise rule that there are: sgd without momentum has none."""
    return () if rule == "sgd" and not sgd_momentum else ELEMENTWISE[rule]


def rule_of(optimizer: str, shape: tuple[int, ...], *, in_layer: bool, is_embedding: bool, low_rank: LowRank) -> str:
    """The rule of a tensor. What galore does not project has adam; its moments, too, have 8 bits if quantised."""
    if optimizer in OF_LAYERS:
        fits = in_layer and len(shape) == 2 and (optimizer not in LOW_RANK or min(shape) > low_rank.rank)
        if optimizer != "galore" or not low_rank.quantized:
            return optimizer if fits else "adam"
        if fits:
            return QUANTIZED
        optimizer = "adamw_8bit"
    if optimizer == "adamw_8bit" and (is_embedding or len(shape) < 2):
        return "adam"
    return optimizer


def state_of(rule: str, shape: tuple[int, ...], low_rank: LowRank) -> State:
    """What the rule keeps of a tensor."""
    if rule in ELEMENTWISE:
        return dict.fromkeys(ELEMENTWISE[rule], (shape, "F32"))
    if rule == "muon":
        return {"momentum_buffer": (shape, "F32")}
    if rule == "adafactor":
        if len(shape) < 2:
            return {"variance": (shape, "F32")}
        return {"row_var": ((*shape[:-1], 1), "F32"), "col_var": ((*shape[:-2], 1, shape[-1]), "F32")}
    if rule == "adamw_8bit":
        return _eight_bits(shape)
    (rows, columns), rank = shape, low_rank.rank
    small, projection = ((rows, rank), (rank, columns)) if rows >= columns else ((rank, columns), (rows, rank))
    if rule == QUANTIZED:
        return _eight_bits(small) | _projection(projection, low_rank)
    found: State = {"exp_avg": (small, "F32"), "exp_avg_sq": (small, "F32"), "ortho_matrix": (projection, "F32")}
    return found | ({"scaled_grad": ((), "F32")} if rule == "apollo" else {})


def _eight_bits(shape: tuple[int, ...]) -> State:
    """Of bitsandbytes' Adam."""
    if prod(shape) < _SMALLEST:
        return dict.fromkeys(("state1", "state2"), (shape, "F32"))
    scales = {name: ((-(-prod(shape) // _BLOCK),), "F32") for name in ("absmax1", "absmax2")}
    return dict.fromkeys(("state1", "state2"), (shape, "U8")) | scales


def _projection(shape: tuple[int, ...], low_rank: LowRank) -> State:
    """Its codes, scales and zero points, and when it is found anew."""
    renewal: State = {"renewal": ((1 + low_rank.queue,), "F32")}
    if low_rank.bits == 32:
        return {"ortho_matrix": (shape, "F32")} | renewal
    groups = -(-prod(shape) // low_rank.group)
    codes = -(-groups * low_rank.group * low_rank.bits // 8)
    return {
        "ortho_codes": ((codes,), "U8"),
        "ortho_scale": ((groups,), "F32"),
        "ortho_zero": ((groups,), "U8"),
    } | renewal


def state_bytes(rule: str, shape: tuple[int, ...], low_rank: LowRank) -> int:
    """Bytes of `state_of`."""
    return sum(prod(own) * _BYTES[dtype] for own, dtype in state_of(rule, shape, low_rank).values())
