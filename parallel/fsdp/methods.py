"""Adapters of PEFT's methods beside LoRA: PEFT's own layers, whole and fp32 on every rank, the base cut as ever.

Most of these methods need their matrices whole, some share one between all layers, and all are small: a rank holds all
of the adapter, and gradients are summed over the ranks once a step.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mswift.converters.adapters import expand_modules_to_save, saved_shapes, trained_name
from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable
from mswift.parallel.batch import Microbatch
from mswift.parallel.engine import Read, StateShard, bytes_of
from mswift.parallel.fsdp.adalora import RankBudget
from mswift.parallel.fsdp.dropout import count_dropouts
from mswift.parallel.mapped import Mapped, shards, whole
from mswift.tuners.hidden import FRAME
from mswift.tuners.inject import inject
from mswift.tuners.method import MethodConfig

_STORED = "adapter."


class MethodAdapters:
    """The adapter in a model, and what of a step belongs to it alone.

    base_names: parameter of the changed model -> its name before; saved: parameter -> where it lies in checkpoints.
    adds_in_place: PEFT's layers add to what a linear of the base gave, in its memory.
    """

    adds_in_place = False

    def __init__(
        self, model: nn.Module, table: ModelTable, config: MethodConfig, modules_to_save: tuple[str, ...]
    ) -> None:
        before = {id(parameter): name for name, parameter in model.named_parameters()}
        model.requires_grad_(False)
        injected = inject(model, config.content(table), config.seed)
        self.drops = count_dropouts(model, injected.tuner.tuner_layer_cls)
        self.base_names = {n: before[id(p)] for n, p in model.named_parameters() if id(p) in before}
        own = {id(p): name for name, p in model.named_parameters()}
        trained = {name: t for name, t in injected.tensors.items() if name not in config.method.frozen}
        assert {n: tuple(t.shape) for n, t in trained.items()} == config.trained_shapes(table)
        self.saved = {own[id(t)]: whole(n, _STORED + n, tuple(t.shape)) for n, t in trained.items()}
        places = {id(t): (owner, key) for owner in model.modules() for key, t in owner._buffers.items()}
        frozen = (name for name in config.method.frozen if name in injected.tensors)
        self._constants = {name: places[id(injected.tensors[name])] for name in frozen}
        parameters = dict(model.named_parameters())
        self.replicated = {name: p for name, p in parameters.items() if name not in self.base_names}
        for name in self.saved:
            parameters[name].requires_grad_(True)
        self._add_modules_in_full(model, table, modules_to_save)
        is_adalora = config.method.name == "adalora"
        self._budget = RankBudget(injected.tuner, self.saved) if is_adalora else None
        self.adds_in_place = is_adalora

    def _add_modules_in_full(self, model: nn.Module, table: ModelTable, modules: tuple[str, ...]) -> None:
        by_base = {base: name for name, base in self.base_names.items()}
        parameters = dict(model.named_parameters())
        for each in saved_shapes(table, expand_modules_to_save(table, modules)):
            name = trained_name(table, each)
            parameter = parameters[by_base[name]].requires_grad_(True)
            self.saved[by_base[name]] = whole(name, _STORED + name, tuple(parameter.shape))

    def move(self, device: torch.device) -> None:
        """To where it is computed; buffers move with the base's."""
        for parameter in self.replicated.values():
            parameter.data = parameter.data.to(device)

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that `extended` puts in front of every sequence."""
        return 0

    def extended(self, batch: Microbatch) -> Microbatch:
        """The batch as the model with the adapter computes it."""
        return batch

    def sum_gradients(self) -> None:
        """Over all ranks, after a step's last backward pass; then what the method itself adds to the loss."""
        mine = [p for p in self.replicated.values() if p.requires_grad]
        for parameter in mine:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in mine if p.grad is not None])
        dist.all_reduce(flat)
        for parameter, part in zip(mine, flat.split([p.numel() for p in mine]), strict=True):
            parameter.grad = part.view_as(parameter)
        if self._budget is not None:
            self._budget.regularise()

    def after_update(self, step: int) -> None:
        """What the method does behind update number `step`, from 1; gradients are there yet."""
        if self._budget is not None:
            self._budget.after_update(step)

    def shards(self) -> Iterator[StateShard]:
        """Constants that PEFT's file holds beside what is trained, from one rank."""
        for name, tensor in self.constants().items():
            shape = tuple(tensor.shape)
            yield from shards(whole(name, _STORED + name, shape), Region.full(shape), tensor.float().cpu())

    def load(self, read: Read) -> None:
        """The constants back."""
        for name, tensor in self.constants().items():
            found = torch.empty(tensor.shape)
            read(_STORED + name, Region.full(tuple(tensor.shape)), bytes_of(found))
            tensor.copy_(found)

    def constants(self) -> dict[str, Tensor]:
        """By name, as in `MethodConfig.shapes`: buffers, which are other tensors once the model has moved."""
        return {name: owner._buffers[key] for name, (owner, key) in self._constants.items()}  # type: ignore[misc]

    def state_shards(self) -> Iterator[StateShard]:
        """What the method keeps from step to step, beside the optimizer's state; from one rank."""
        if self._budget is not None:
            yield from self._budget.shards()

    def load_state(self, read: Read) -> None:
        """As `state_shards` wrote it."""
        if self._budget is not None:
            self._budget.load(read)


def decays(mapped: Mapped) -> bool:
    """Whether weight decay is for it: a matrix, not a vector that PEFT shapes like one ([o, 1]), nor a frame's."""
    return sum(size > 1 for size in mapped.shape) > 1 and not mapped.name.endswith(FRAME)
