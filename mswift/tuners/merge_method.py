"""Merging an adapter of a method beside LoRA: PEFT's own merge, one linear in memory at a time, in fp32."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mswift.converters.adapters import EMBED, HEAD, SAVABLE
from mswift.converters.io.files import open_read, read_exactly
from mswift.converters.io.stored import StoredTensor
from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError
from mswift.tuners.method_adapter import MethodAdapter
from mswift.tuners.skeleton import MergedLinears

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class MethodFold:
    """Which tensors of a base an adapter changes, and their new values."""

    def __init__(self, table: ModelTable, stored: Mapping[str, StoredTensor], adapter: MethodAdapter) -> None:
        self._stored, self._linears = stored, MergedLinears(table, adapter)
        for name in self._linears.names:
            if f"{name}.weight" not in stored:
                raise ConfigError(f"{adapter.file}: has an adapter for {name}, which is no tensor of the base's files")
        whole = (name for name in adapter.shapes if name in stored or name in SAVABLE.values())
        self.replaced = dict.fromkeys(whole, adapter)
        embedding, head = SAVABLE[EMBED], SAVABLE[HEAD]
        if table.spec.tied_embeddings and embedding in self.replaced:
            if not torch.equal(adapter.tensor(embedding).float(), adapter.tensor(head).float()):
                raise ConfigError(
                    f"{adapter.file}: {embedding} and {head} differ, but the base ties them; merge with PEFT "
                    "(merge_and_unload), which unties them"
                )
            self.replaced.pop(head)

    @property
    def num_linears(self) -> int:
        """How many are changed."""
        return len(self._linears.names)

    def changes(self, name: str) -> bool:
        """Whether a tensor of the base is part of a linear with an adapter."""
        module, _, part = name.rpartition(".")
        return module in self._linears.names and part in ("weight", "bias")

    def blocks(self, name: str) -> Iterator[memoryview]:
        """The new bytes of such a tensor."""
        module, _, part = name.rpartition(".")
        weight = _whole(self._stored[f"{module}.weight"])
        bias = self._stored.get(f"{module}.bias")
        merged = self._linears.merge(module, weight, None if bias is None else _whole(bias))
        value = merged[0] if part == "weight" else merged[1]
        assert value is not None
        raw: Any = value.to(TORCH[self._stored[name].dtype]).contiguous().view(-1).view(torch.uint8).numpy()
        yield memoryview(raw)


def _whole(tensor: StoredTensor) -> Tensor:
    """fp32."""
    raw = bytearray(tensor.nbytes)
    with open(open_read(tensor.path), "rb") as file:
        read_exactly(file.fileno(), memoryview(raw), tensor.offset, tensor.path)
    return torch.frombuffer(raw, dtype=TORCH[tensor.dtype]).view(tensor.shape).float()
