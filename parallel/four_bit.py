"""A frozen weight in four bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes, on either engine.

Every 64 neighbours in a row of a weight share one fp32 scale, as in bitsandbytes' blocks of a whole HF matrix.
Shapes: i/o features of this rank's part of a linear.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from mswift.errors import ConfigError
from mswift.startup import quiet_advice

Kind = Literal["nf4", "fp4"]
BLOCK = 64
"""Elements of a row with one scale."""

_PACKED = "four_bit_weight"


class PackedWeight:
    """A frozen weight [o, i] of a linear; `parameter` keeps its shape and marks, and between uses no memory."""

    def __init__(self, parameter: nn.Parameter, kind: Kind) -> None:
        self._parameter, self._kind = parameter, kind
        self._codes: Tensor | None = None
        self._state: Any = None

    @property
    def elements(self) -> int:
        """Of the weight, those that codes here stand for."""
        return self._parameter.numel()

    @property
    def nbytes(self) -> int:
        """Of codes and scales here; 0 before the weight was read."""
        if self._codes is None:
            return 0
        return sum(tensor.numel() * tensor.element_size() for tensor in (self._codes, self._state.absmax))

    @contextmanager
    def filled(self) -> Iterator[Tensor]:
        """While inside, the parameter has memory to read values into; at the end they become four bits each."""
        values = self._parameter.data
        storage = values.untyped_storage()
        storage.resize_(values.numel() * values.element_size())
        try:
            yield values
            self._keep(values)
        finally:
            storage.resize_(0)

    def _keep(self, values: Tensor) -> None:
        self._codes, self._state = library().quantize_4bit(
            values, blocksize=BLOCK, compress_statistics=False, quant_type=self._kind
        )

    def whole(self) -> Tensor:
        """[o, i] in the dtype of the model."""
        if self._codes is None:
            raise RuntimeError("a 4-bit weight is used before it was read")
        values: Tensor = library().dequantize_4bit(self._codes, self._state)
        return values


def pack(parameter: nn.Parameter, kind: Kind) -> PackedWeight:
    """Let four bits stand for a weight, which has memory from now on only while it is used."""
    return stand_for(parameter, PackedWeight(parameter, kind))


def stand_for(parameter: nn.Parameter, own: PackedWeight) -> PackedWeight:
    """Let `own` be found by the parameter, which loses its memory."""
    setattr(parameter, _PACKED, own)
    parameter.data.untyped_storage().resize_(0)
    return own


def packed(parameter: Tensor) -> PackedWeight | None:
    """The four bits that stand for a parameter, if some do."""
    found: PackedWeight | None = getattr(parameter, _PACKED, None)
    return found


def library() -> Any:
    quiet_advice()
    try:
        import bitsandbytes.functional as found
    except ImportError as error:
        raise ConfigError(f"--quant_method bnb needs bitsandbytes ({error}): pip install 'mswift[quant]'") from None
    return found
