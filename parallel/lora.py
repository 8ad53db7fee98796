"""The A and B of one Hugging Face linear or parameter, this rank's part, as megatron-core has to see them.

Shapes: i, o features of the HF linear, r rank; of a cut matrix this rank's. `mswift.parallel.fused_lora` computes.
Import after `mswift.parallel.device.prepare`.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from mswift.converters.layout import Region
from mswift.parallel.megatron.linears import DuplicatedLinear
from mswift.tuners.init import kaiming_uniform
from mswift.tuners.lora import Adapted

Base: TypeAlias = ColumnParallelLinear | RowParallelLinear | DuplicatedLinear
SLOT = "adapter_slot"
IS_LORA_B = "is_lora_b"
"""Attribute of a parameter with the learning rate of B (LoRA+, Hayou et al. 2024, arXiv 2402.12354)."""


class Slot(NamedTuple):
    """What a trained parameter is of the whole: its rows are `regions` of the tensor `name` [*shape], in turn."""

    name: str
    shape: tuple[int, ...]
    regions: tuple[Region, ...]
    is_expert: bool = False


class LoraPair(nn.Module):
    """A and B of one HF linear, this rank's part: of B the given rows (first, count), one after the other.

    B of stacked experts is [o, r, 1], one expert of PEFT's [o, r, expert]. `lora_magnitude_vector` [o]: of DoRA.
    `start_A`, `start_B`: of an adapter that starts as a part of the weight, which it must not add (PiSSA, OLoRA);
    they do not train and are in checkpoints.
    """

    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, adapted: Adapted, seed: int, base: Base, rows: Sequence[tuple[int, int]]):
        super().__init__()
        weight, rank, experts, expert = base.weight, adapted.rank, adapted.num_experts, adapted.expert
        self.adapted, self.scale = adapted, adapted.scale
        self.first_input, num_inputs = (0, adapted.in_features)
        if isinstance(base, RowParallelLinear):
            self.first_input, num_inputs = part(adapted.in_features, base.tp_group.rank(), base.tp_group.size())
        start = kaiming_uniform(seed, adapted.name_a, rank, adapted.in_features, expert * rank)
        mine = torch.from_numpy(start[:, self.first_input : self.first_input + num_inputs])
        self.lora_A = nn.Parameter(mine.to(device=weight.device, dtype=weight.dtype, copy=True).contiguous())
        width, place = ((rank,), (0,)) if experts == 1 else ((rank, 1), (0, expert))
        self.lora_B = nn.Parameter(weight.new_zeros(sum(count for _, count in rows), *width))
        self.lora_magnitude_vector = nn.Parameter(weight.new_ones(len(self.lora_B))) if adapted.dora else None
        shape_a = (rank * experts, adapted.in_features)
        shape_b = (adapted.out_features, rank) if experts == 1 else (adapted.out_features, rank, experts)
        regions_a = (Region((expert * rank, self.first_input), (rank, num_inputs)),)
        regions_b = tuple(Region((first, *place), (count, *width)) for first, count in rows)
        regions_m = tuple(Region((first,), (count,)) for first, count in rows)
        is_expert = getattr(base, "is_expert", False)
        slots = {
            "lora_A": Slot(adapted.name_a, shape_a, regions_a, is_expert),
            "lora_B": Slot(adapted.name_b, shape_b, regions_b, is_expert),
            "lora_magnitude_vector": Slot(adapted.name_magnitude, (adapted.out_features,), regions_m, is_expert),
        }
        cut_a, cut_b = isinstance(base, RowParallelLinear), isinstance(base, ColumnParallelLinear)
        for name, parameter in self.named_parameters():
            in_a = name == "lora_A"
            mark(parameter, slots[name], base, cut=(1 if in_a else 0) if (cut_a if in_a else cut_b) else None)
            setattr(parameter, IS_LORA_B, not in_a)
        for letter, parameter in (("A", self.lora_A), ("B", self.lora_B)):
            begun = parameter.detach().clone() if adapted.starts_in_weight else None
            self.register_buffer(f"start_{letter}", begun)
            if begun is not None:
                is_cut = getattr(parameter, "tensor_model_parallel", False)
                set_tensor_model_parallel_attributes(begun, is_cut, 0, 1)
                slot = slots[f"lora_{letter}"]
                setattr(begun, SLOT, slot._replace(name=slot.name.replace(".weight", ".start")))

    @property
    def rank(self) -> int:
        """Rows of `matrix_a`."""
        return len(self.lora_A) * (1 if self.start_A is None else 2)

    def matrix_a(self) -> Tensor:
        """A [r, i]; with its start [2r, i]."""
        return self.lora_A if self.start_A is None else torch.cat((self.lora_A, self.start_A))

    def matrix_b(self) -> Tensor:
        """B [o, r]; with its start, which is taken off, [o, 2r]."""
        return self.lora_B.flatten(1) if self.start_B is None else torch.cat((self.lora_B, -self.start_B), dim=1)


class ParameterLora(nn.Module):
    """A and B of a small matrix that every tensor-parallel rank has whole (a router): weight + scale * B @ A."""

    def __init__(self, adapted: Adapted, seed: int, weight: nn.Parameter):
        super().__init__()
        shape_a, shape_b = (adapted.rank, adapted.in_features), (adapted.out_features, adapted.rank)
        self.scale = adapted.scale
        start = torch.from_numpy(kaiming_uniform(seed, adapted.name_a, *shape_a))
        self.lora_A = nn.Parameter(start.to(device=weight.device, dtype=weight.dtype, copy=True))
        self.lora_B = nn.Parameter(weight.new_zeros(shape_b))
        for parameter, name, shape in (
            (self.lora_A, adapted.name_a, shape_a),
            (self.lora_B, adapted.name_b, shape_b),
        ):
            setattr(parameter, SLOT, Slot(name, shape, (Region.full(shape),)))
            parameter.allreduce = True  # type: ignore[attr-defined]
            parameter.sequence_parallel = getattr(weight, "sequence_parallel", False)  # type: ignore[attr-defined]
        setattr(self.lora_B, IS_LORA_B, True)

    def forward(self, weight: Tensor) -> Tensor:
        """[o, i] -> the same, adapted."""
        return torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.scale)


def mark(parameter: nn.Parameter, slot: Slot, base: Base, cut: int | None) -> None:
    """Note what the parameter is, and tell megatron-core how its gradient is summed and counted.

    cut: the axis that is cut over the ranks of the base, None: each of them has the whole.
    """
    setattr(parameter, SLOT, slot)
    parameter.allreduce = not slot.is_expert  # type: ignore[attr-defined]  # over data-parallel ranks, or experts'
    if slot.is_expert:
        is_first = base.tp_group.rank() == 0
        if cut is not None or is_first:  # each one is counted in the norm, on dense tensor-parallel ranks as well
            set_tensor_model_parallel_attributes(parameter, True, cut or 0, 1)
        else:
            parameter.shared = True  # type: ignore[attr-defined]
    elif cut is not None:
        set_tensor_model_parallel_attributes(parameter, True, cut, 1)
    else:
        parameter.sequence_parallel = base.sequence_parallel  # type: ignore[attr-defined]


def part(features: int, rank: int, size: int) -> tuple[int, int]:
    """(offset, length) of an even cut; `ModelTable.check_tp` has refused sizes that do not divide."""
    return features // size * rank, features // size
