"""Counts what crosses ranks: every collective of torch.distributed, seen where it is dispatched, by axis and kind.

c10d's collectives are torch operators, so that none is missed, whoever calls it: megatron-core, autograd, mswift.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mswift.parallel.traffic import Kind, Traffic

CONTROL_BYTES = 64
"""Collectives no larger than this (counts, norms, losses of a step) are counted as the axis "control"."""

_KINDS: Mapping[str, tuple[Kind | str, str]] = {
    "allreduce_": ("all_reduce", "tensors"),
    "allreduce_coalesced_": ("all_reduce", "tensors"),
    "_allgather_base_": ("all_gather", "output_tensor"),
    "allgather_": ("all_gather", "output_tensors"),
    "allgather_into_tensor_coalesced_": ("all_gather", "outputs"),
    "_reduce_scatter_base_": ("reduce_scatter", "input_tensor"),
    "reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs"),
    "alltoall_base_": ("all_to_all", "input"),
    "alltoall_": ("all_to_all", "input_tensors"),
    "broadcast_": ("broadcast", "tensors"),
    "send": ("send", "tensors"),
}
"""Operator -> (kind, the argument whose bytes count). A receive is another rank's send; a barrier has no bytes."""

_WITHOUT_BYTES = frozenset({"recv_", "recv_any_source_", "barrier", "monitored_barrier_"})


class TrafficCounter(TorchDispatchMode):
    """Inside it, collectives of this rank are counted. `axes`: name of a process group -> axis; others are "other".

    Groups of one rank do not count. Raises NotImplementedError for a collective that it does not know.
    """

    def __init__(self, axes: Mapping[str, str]) -> None:
        super().__init__()
        self._axes = axes
        self._found: dict[tuple[str, str], tuple[int, int]] = {}

    @property
    def found(self) -> list[Traffic]:
        """What was counted so far."""
        return [Traffic(*key, *value) for key, value in self._found.items()]  # type: ignore[arg-type]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operator and run it."""
        if func.namespace == "c10d":
            self._count(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _count(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        schema = func._schema  # type: ignore[attr-defined]
        name = schema.name.partition("::")[2]
        if name in _WITHOUT_BYTES:
            return
        if name not in _KINDS:
            raise NotImplementedError(f"TrafficCounter does not know the collective {schema.name}")
        kind, what = _KINDS[name]
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        group = dist.ProcessGroup.unbox(given["process_group"])
        if group.size() == 1:
            return
        num_bytes = _num_bytes(given[what])
        axis = "control" if num_bytes <= CONTROL_BYTES else self._axes.get(group.group_name, "other")
        calls, before = self._found.get((axis, kind), (0, 0))
        self._found[axis, kind] = calls + 1, before + num_bytes


def _num_bytes(tensors: Any) -> int:
    """Of a tensor, or of all tensors in nested lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_num_bytes, tensors))
