"""LoRA that starts as a part of the weight (PiSSA, OLoRA) on PEFT's layers: the base stays, the start is taken off.

What PEFT subtracts from its weight (scale * B @ A of the start) is kept beside A and B as frozen parameters, cut over
ranks like them, and its product taken off in the forward pass. Shapes: o, i features of a linear, r rank.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from mswift.parallel.mapped import Mapped
from mswift.tuners.factors import factorised
from mswift.tuners.inject import NAME
from mswift.tuners.lora import Adapted

_CHILD = "lora_start"
MARK = f".{_CHILD}."
"""In names of parameters that hold a start."""


Factors = Callable[[str, Adapted, Tensor], tuple[Tensor, Tensor]]
"""(name of an A in files, its adapter, the whole weight [o, i]) -> A [r, i] and B [o, r]."""


class Start(nn.Module):
    """A [r, i] and B [o, r] as they began, without memory yet."""

    def __init__(self, rank: int, inputs: int, outputs: int, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self._scale = scale
        self.A = nn.Parameter(torch.empty(rank, inputs, dtype=dtype, device="meta"), requires_grad=False)
        self.B = nn.Parameter(torch.empty(outputs, rank, dtype=dtype, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, i] -> what it adds, [b, s, o]."""
        return F.linear(F.linear(x, self.A), self.B) * self._scale


def add_starts(model: nn.Module, dtype: torch.dtype) -> None:
    """Give each LoRA of PEFT's in the model a start, which its output is without."""
    from peft.tuners.lora import LoraLayer

    for module in list(model.modules()):
        if not isinstance(module, LoraLayer):
            continue
        a, b = module.lora_A[NAME], module.lora_B[NAME]
        inputs, outputs = a.in_features, b.out_features
        module.add_module(_CHILD, Start(a.out_features, inputs, outputs, module.scaling[NAME], dtype))  # type: ignore
        module.register_forward_hook(_without_start)  # type: ignore[operator]


def _without_start(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output - getattr(module, _CHILD)(inputs[0])


def stored_start(name: str) -> str:
    """Name in checkpoints of a parameter that holds a start, as the Megatron engine has it."""
    module, _, letter = name.partition(MARK)
    return f"{module}.lora_{letter}.start"


@torch.no_grad()
def start_in_weights(
    parameters: Mapping[str, nn.Parameter],
    base: Mapping[str, Mapped],
    of: Mapping[str, Adapted],
    factors: Factors,
) -> None:
    """A, B and their starts from the weights of the base, which are there. Ranks take the linears by turns.

    base: parameter -> its place; of: name of an A, in files -> its adapter.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    by_name = {mapped.name: name for name, mapped in base.items()}
    for number, (name, adapted) in enumerate(linears(of)):
        whole = _whole(parameters[by_name[f"{adapted.name}.weight"]])
        a = whole.new_empty(adapted.rank, adapted.in_features)
        b = whole.new_empty(adapted.out_features, adapted.rank)
        if number % world == rank:
            a, b = (factor.to(whole.dtype).contiguous() for factor in factors(name, adapted, whole))
        for matrix in (a, b) if world > 1 else ():
            dist.broadcast(matrix, number % world)
        place(parameters, adapted, a, b)


def from_weights(seed: int) -> Factors:
    """Those of PiSSA and OLoRA."""

    def factors(name: str, adapted: Adapted, whole: Tensor) -> tuple[Tensor, Tensor]:
        return factorised(whole.float(), adapted.rank, adapted.scale, adapted.init, drawn_from(seed, name))

    return factors


def drawn_from(seed: int, name: str) -> int:
    """Seed of what is random in the start of one adapter; name: of its A, in files."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


@torch.no_grad()
def place(parameters: Mapping[str, nn.Parameter], adapted: Adapted, a: Tensor, b: Tensor) -> None:
    """This rank's rows of whole A and B, and of what they started from where that is kept."""
    for letter, matrix in (("A", a), ("B", b)):
        for target in (f"{adapted.prefix}.lora_{letter}.{NAME}.weight", f"{adapted.prefix}{MARK}{letter}"):
            if target in parameters:
                _fill(parameters[target], matrix)


def linears(of: Mapping[str, Adapted]) -> Iterator[tuple[str, Adapted]]:
    """Name of A -> adapter, once each."""
    for name, adapted in of.items():
        if name == adapted.name_a:
            yield name, adapted


def _whole(parameter: Tensor) -> Tensor:
    """The whole value where its ranks meet, which an offloaded part is not."""
    if isinstance(parameter, DTensor):
        here: Any = parameter.detach().to(parameter.device_mesh.device_type)
        return here.full_tensor()  # type: ignore[no-any-return]
    return parameter.detach()


def _fill(parameter: Tensor, value: Tensor) -> None:
    """This rank's part of a whole value."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(value)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if sizes[0]:
        parameter.to_local().copy_(value[offsets[0] : offsets[0] + sizes[0]])
