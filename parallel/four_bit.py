"""A frozen weight in four bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes, on either engine.

Every 64 neighbours in a row of a weight share one fp32 scale, as in bitsandbytes' blocks of a whole HF matrix.
Shapes: i/o features of this rank's part of a linear.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mswift.errors import ConfigError
from mswift.parallel.engine import Read

Kind = Literal["nf4", "fp4"]
BLOCK = 64
"""Elements of a row with one scale."""

_PACKED = "four_bit_weight"


class FourBits(ABC):
    """What stands for a frozen weight [o, i] of a linear; `parameter` keeps its shape and marks.

    ranks: those over which rows are cut, of which `count` from `first` on are here (None: all are).
    """

    def __init__(self, parameter: nn.Parameter, ranks: dist.ProcessGroup | None = None) -> None:
        self._parameter, self._ranks, rows = parameter, ranks, parameter.shape[0]
        self._padded = rows if ranks is None else -(-rows // ranks.size())
        self.first = 0 if ranks is None else min(self._padded * ranks.rank(), rows)
        self.count = min(self._padded, rows - self.first)

    @property
    def is_cut(self) -> bool:
        """Whether rows are on other ranks."""
        return self._ranks is not None

    @property
    def elements(self) -> int:
        """Of the weight, those that codes here stand for."""
        return self.count * self._parameter.shape[1]

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Of codes and scales here; 0 before the weight was read."""

    @abstractmethod
    def passes(self, read: Read, stored: torch.dtype) -> Iterator[tuple[Tensor, Read, torch.dtype]]:
        """(memory [count, i], what reads into it, and the dtype that delivers), kept as the next is asked for.

        read, stored: of the weight's values.
        """

    @abstractmethod
    def whole(self) -> Tensor:
        """[o, i] in the dtype of the model; to be called by all ranks that share the rows."""

    def gathered(self, mine: Tensor) -> Tensor:
        """That of all ranks, one behind the other."""
        if self._ranks is None:
            return mine
        every = mine.new_empty(self._ranks.size() * len(mine), *mine.shape[1:])
        dist.all_gather_into_tensor(every, mine, group=self._ranks)
        return every


class PackedWeight(FourBits):
    """Codes of bitsandbytes."""

    def __init__(self, parameter: nn.Parameter, kind: Kind, ranks: dist.ProcessGroup | None = None) -> None:
        super().__init__(parameter, ranks)
        self._kind = kind
        self._codes: Tensor | None = None
        self._state: Any = None

    @property
    def nbytes(self) -> int:
        if self._codes is None:
            return 0
        return sum(tensor.numel() * tensor.element_size() for tensor in (self._codes, self._state.absmax))

    def passes(self, read: Read, stored: torch.dtype) -> Iterator[tuple[Tensor, Read, torch.dtype]]:
        with self.filled() as values:
            yield values, read, stored

    @contextmanager
    def filled(self) -> Iterator[Tensor]:
        """Memory [count, i] to read this rank's rows into; at the end they become four bits each."""
        values = self._parameter.new_zeros(self._padded, self._parameter.shape[1])
        yield values[: self.count]
        self._codes, self._state = library().quantize_4bit(
            values, blocksize=BLOCK, compress_statistics=False, quant_type=self._kind
        )

    def whole(self) -> Tensor:
        if self._codes is None:
            raise RuntimeError("a 4-bit weight is used before it was read")
        if self._ranks is None:
            values: Tensor = library().dequantize_4bit(self._codes, self._state)
            return values
        rows, inputs = self._parameter.shape
        state = copy(self._state)
        state.absmax, state.shape = self.gathered(self._state.absmax)[: rows * inputs // BLOCK], self._parameter.shape
        values = library().dequantize_4bit(self.gathered(self._codes)[: rows * inputs // 2], state)
        return values


def stand_for(parameter: nn.Parameter, own: FourBits) -> FourBits:
    """Let `own` be found by the parameter, which loses its memory."""
    setattr(parameter, _PACKED, own)
    parameter.data.untyped_storage().resize_(0)
    return own


def packed(parameter: Tensor) -> FourBits | None:
    """The four bits that stand for a parameter, if some do."""
    found: FourBits | None = getattr(parameter, _PACKED, None)
    return found


def passes(
    parameter: Tensor, values: Tensor, read: Read, stored: torch.dtype
) -> Iterable[tuple[Tensor, Read, torch.dtype]]:
    """`FourBits.passes` of what stands for a parameter; else its values, once."""
    own = packed(parameter)
    return [(values, read, stored)] if own is None else own.passes(read, stored)


def library() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises to install a kernel that is not used here
    try:
        import bitsandbytes.functional as found
    except ImportError as error:
        raise ConfigError(f"--quant_method bnb needs bitsandbytes ({error}): pip install 'mswift[quant]'") from None
    return found
