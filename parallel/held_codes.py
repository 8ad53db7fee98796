"""A frozen weight that keeps the four-bit codes of its checkpoint (GPTQ, AWQ), on either engine.

Made anew wherever it is used, by the arithmetic of the reader: scale * (code - zero) in fp32, rounded to the dtype of
the checkpoint's other weights, then to the model's. So it is the dequantised weight, bit for bit.
Shapes: i/o features of this rank's part of a linear, g groups of inputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mswift.converters.quantization import codes_of
from mswift.converters.reader import WeightReader
from mswift.errors import CheckpointError, LayoutError
from mswift.parallel.engine import SOURCE_DTYPES, Read
from mswift.parallel.four_bit import FourBits

ZERO_STEP = 256
"""A code and its zero are read as one number: code + ZERO_STEP * zero."""

_PIECE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class HeldCodes:
    """Which weights of a checkpoint keep their codes: `names` in its files, `group` inputs with one scale (-1: all).

    dtype: of the dequantised weights; scale_dtype: of scales as they are stored.
    """

    method: str
    group: int
    dtype: str
    scale_dtype: str
    names: frozenset[str]

    def has(self, sources: frozenset[str], where: str) -> bool:
        """Whether the weight that these tensors make keeps codes. LayoutError where some have codes, some not."""
        found = sources & self.names
        if found and found != sources:
            raise LayoutError(
                f"--quant_method {self.method}: {where} is made of {min(found)}, which has codes, and of "
                f"{min(sources - found)}, which has none: leave --quant_method out"
            )
        return bool(found)

    def group_of(self, inputs: int, where: str) -> int:
        """Inputs with one scale in rows of `inputs`; LayoutError where those are no whole groups."""
        size = inputs if self.group == -1 else self.group
        if inputs % size or inputs % 2:
            raise LayoutError(
                f"--quant_method {self.method}: {where} has {inputs} inputs on a rank, which are no whole groups of "
                f"{size}: use a smaller --tensor_model_parallel_size, or leave --quant_method out"
            )
        return size


def held_codes(reader: WeightReader) -> HeldCodes:
    """Of all weights of a checkpoint that have codes of GPTQ or AWQ. CheckpointError where it has none."""
    how, coded = codes_of(reader.config), reader.coded
    if how is None or not coded:
        raise CheckpointError(f"{reader.hf_files}: has no codes of GPTQ or AWQ")
    scales = set(coded.values())
    return HeldCodes(how.method, how.group, reader.dtype, scales.pop() if len(scales) == 1 else "F32", frozenset(coded))


class CodesWeight(FourBits):
    """A frozen weight [o, i]; `ranks`: those over which its rows are cut, each holding some (None: all are here)."""

    def __init__(self, parameter: nn.Parameter, base: HeldCodes, where: str, ranks: dist.ProcessGroup | None) -> None:
        super().__init__(parameter, ranks)
        self._base, self._where = base, where
        self._size = base.group_of(parameter.shape[1], where)
        self._codes = self._zeros = self._scales = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self._codes, self._zeros, self._scales))

    def passes(self, read: Read, stored: torch.dtype) -> Iterator[tuple[Tensor, Read, torch.dtype]]:
        inputs, of_part = self._parameter.shape[1], cast(Callable[..., None], read)
        values = torch.zeros(self._padded, inputs, dtype=torch.float32, device=self._parameter.device)
        yield values[: self.count], partial(of_part, part="codes"), torch.float32
        self._keep_codes(values)
        yield values[: self.count], partial(of_part, part="scales"), torch.float32
        self._scales = self._by_group(values).to(SOURCE_DTYPES[self._base.scale_dtype])

    def _keep_codes(self, values: Tensor) -> None:
        """values [rows, i]: code + ZERO_STEP * zero."""
        codes, zeros = values.remainder(ZERO_STEP), values.div(ZERO_STEP, rounding_mode="floor")
        self._zeros = self._by_group(zeros).to(torch.uint8)
        pairs = codes.to(torch.uint8)
        self._codes = pairs[:, 0::2] | (pairs[:, 1::2] << 4)

    def _by_group(self, values: Tensor) -> Tensor:
        """[rows, i], the same for the inputs of a group -> [rows, g]."""
        groups = values.view(len(values), -1, self._size)
        if not torch.equal(groups, groups[:, :, :1].expand_as(groups)):
            raise CheckpointError(
                f"--quant_method {self._base.method}: {self._where} has other scales or zeros within {self._size} "
                "neighbours, as with act-order (desc_act): leave --quant_method out"
            )
        return groups[:, :, 0].contiguous()

    def whole(self) -> Tensor:
        if not self._scales.is_floating_point():
            raise RuntimeError("a 4-bit weight is used before it was read")
        rows, inputs = self._parameter.shape
        codes, zeros, scales = (self.gathered(part)[:rows] for part in (self._codes, self._zeros, self._scales))
        out = self._parameter.new_empty(rows, inputs)
        step = max(1, _PIECE_ELEMENTS // inputs)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            pairs = codes[first:last]
            values = torch.stack((pairs & 15, pairs >> 4), dim=-1).view(last - first, -1, self._size).float()
            values -= zeros[first:last, :, None]
            values *= scales[first:last, :, None].float()
            out[first:last] = values.view(last - first, inputs).to(SOURCE_DTYPES[self._base.dtype])
        return out
