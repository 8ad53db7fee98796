"""Whole models in memory, in Hugging Face space and in Megatron space, moved by the family's table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mswift.converters.arrays import Arrays, to_hf, to_megatron
from mswift.converters.layout import Region
from mswift.converters.plan import table_for
from mswift.train.proof_tensors import assemble, gather

__all__ = ["Arrays", "MemoryReader", "assemble", "gather", "read_array", "to_hf", "to_megatron", "weights_of"]


class MemoryReader:
    """A `WeightReader` over the weights of a transformers model."""

    def __init__(self, config: dict[str, Any], hf: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self.config, self.table, self.dtype = config, table_for(config, hf), "F32"
        self.hf_files = Path("memory")
        self.tensors = to_megatron(hf, self.table)

    def dtype_of(self, key: str) -> str:
        """Dtype of one Megatron tensor."""
        return self.dtype

    def read(self, key: str, region: Region, out: memoryview) -> None:
        """Bytes of a region, C order."""
        read_array(self.tensors[key], region, out)


def read_array(array: np.ndarray[Any, Any], region: Region, out: memoryview) -> None:
    """Copy a region of an array into a buffer of exactly its size."""
    box = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
    out[:] = np.ascontiguousarray(array[box]).tobytes()


def weights_of(model: torch.nn.Module) -> Arrays:
    """fp32 weights of a transformers model by name, buffers that it saves among them; a tied head is left out."""
    saved = model.state_dict()
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().numpy() for name, tensor in tensors if name in saved}
