"""Linears of a model and nothing else, with PEFT's layers on them: a place to merge adapters, linear by linear."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mswift.converters.plan import ModelTable
from mswift.errors import CheckpointError
from mswift.tuners.inject import NAME, inject
from mswift.tuners.method_adapter import MethodAdapter


def bare_linears(shapes: Iterable[tuple[str, int, int, bool]]) -> nn.Module:
    """Modules of these (name, inputs, outputs, has a bias) at their places, without memory."""
    root = nn.Module()
    for name, inputs, outputs, bias in shapes:
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(leaf, nn.Linear(inputs, outputs, bias=bias, device="meta"))
    return root


class MergedLinears:
    """An adapter of one of PEFT's methods, whole and fp32, on the linears of its model; weights come one by one."""

    def __init__(self, table: ModelTable, adapter: MethodAdapter) -> None:
        config, self._file = adapter.config, adapter.file
        adapter.check(config.file_shapes(table, adapter.modules_to_save))
        linears = config.linears(table)
        self.names = frozenset(linear.name for linear in linears)
        self._model = bare_linears(
            (x.name, x.in_features, x.out_features, f"{x.name}.bias" in table.hf) for x in linears
        )
        injected = inject(self._model, config.content(table), 0)
        with torch.no_grad():
            for name, tensor in injected.tensors.items():
                tensor.copy_(adapter.tensor(name))

    @torch.no_grad()
    def merge(self, name: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """PEFT's merge of one linear: weight [o, i] and bias [o], fp32 -> the same with the adapter in them.

        CheckpointError where the sums are not finite.
        """
        layer = self._model.get_submodule(name)
        base = layer.get_base_layer()  # type: ignore[operator]
        kept = dict(base._parameters)
        base._parameters.update(weight=nn.Parameter(weight), bias=None if bias is None else nn.Parameter(bias))
        try:
            layer.merge(safe_merge=True, adapter_names=[NAME])  # type: ignore[operator]
            return base.weight.data, None if bias is None else base.bias.data
        except ValueError as error:
            raise CheckpointError(f"{self._file}: merging into {name}: {error}") from error
        finally:
            base._parameters.update(kept)
            layer.merged_adapters.clear()  # type: ignore[operator, union-attr]
