"""Update rules of `--optimizer`: which one a tensor has, and what it keeps between steps. No torch.

An elementwise rule keeps tensors like the parameter, which lie where its rows lie. The others need a matrix as a whole
and keep what `state_of` says.
"""

from math import prod
from typing import Literal

OptimizerName = Literal["adam", "sgd", "lion", "adafactor", "adamw_8bit", "muon", "galore", "apollo"]

ELEMENTWISE = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",), "lion": ("exp_avg",)}
"""Names of a rule's fp32 tensors, each shaped like the parameter."""

OF_MEGATRON = ("adam", "sgd")
"""Those that megatron-core's optimizer has too."""

OF_LAYERS = ("muon", "galore", "apollo")
"""Rules of the matrices of layers alone; embedding, output layer and vectors have adam beside them."""

LOW_RANK = ("galore", "apollo")
"""Rules that keep their moments of `galore_rank` rows or columns."""

LIBRARIES = {"adamw_8bit": "bitsandbytes", "galore": "galore_torch", "apollo": "apollo_torch"}
"""What has to be installed (pip install 'mswift[optim]')."""

_BLOCK, _SMALLEST = 256, 4096  # of bitsandbytes: elements with a common scale, and of a tensor that is kept in 8 bits
_BYTES = {"F32": 4, "U8": 1}

State = dict[str, tuple[tuple[int, ...], str]]
"""Name -> (shape, dtype)."""


def rule_of(optimizer: str, shape: tuple[int, ...], *, in_layer: bool, is_embedding: bool, rank: int) -> str:
    """The rule of a tensor; `rank` is galore_rank."""
    if optimizer in OF_LAYERS:
        fits = in_layer and len(shape) == 2 and (optimizer not in LOW_RANK or min(shape) > rank)
        return optimizer if fits else "adam"
    if optimizer == "adamw_8bit" and (is_embedding or len(shape) < 2):
        return "adam"
    return optimizer


def state_of(rule: str, shape: tuple[int, ...], rank: int) -> State:
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
        if prod(shape) < _SMALLEST:
            return dict.fromkeys(("state1", "state2"), (shape, "F32"))
        scales = {name: ((-(-prod(shape) // _BLOCK),), "F32") for name in ("absmax1", "absmax2")}
        return dict.fromkeys(("state1", "state2"), (shape, "U8")) | scales
    rows, columns = shape
    small, projection = ((rows, rank), (rank, columns)) if rows >= columns else ((rank, columns), (rows, rank))
    low_rank: State = {"exp_avg": (small, "F32"), "exp_avg_sq": (small, "F32"), "ortho_matrix": (projection, "F32")}
    return low_rank | ({"scaled_grad": ((), "F32")} if rule == "apollo" else {})


def state_bytes(rule: str, shape: tuple[int, ...], rank: int) -> int:
    """Bytes of `state_of`."""
    return sum(prod(own) * _BYTES[dtype] for own, dtype in state_of(rule, shape, rank).values())
