"""Bytes that this rank holds for each parameter: frozen ones have their weight and nothing else."""

from collections.abc import Sequence

from mswift.parallel.engine import Held
from mswift.parallel.megatron.four_bit import packed
from mswift.parallel.megatron.optimizer import ShardedOptimizer
from mswift.parallel.megatron.placement import Placed


def held_bytes(base: Sequence[Placed], trained: Sequence[Placed], optimizer: ShardedOptimizer) -> tuple[Held, Held]:
    """(of frozen parameters and buffers, of trained ones) of this rank."""
    learning = [placed for placed in trained if not placed.is_buffer]
    known = {id(placed.parameter) for placed in learning}
    frozen = {id(p.parameter): p for p in (*base, *trained) if id(p.parameter) not in known}
    return _held(list(frozen.values()), optimizer), _held(learning, optimizer)


def _held(parameters: Sequence[Placed], optimizer: ShardedOptimizer) -> Held:
    elements = weights = gradients = state = 0
    for placed in parameters:
        parameter = placed.parameter
        elements += parameter.numel()
        four_bits = packed(parameter)
        weights += parameter.numel() * parameter.element_size() if four_bits is None else four_bits.nbytes
        gradient = getattr(parameter, "main_grad", None)
        gradients += 0 if gradient is None else gradient.numel() * gradient.element_size()
        if not placed.is_buffer and (owned := optimizer.owned_range(parameter)) is not None:
            state += (owned[1] - owned[0]) * optimizer.bytes_per_element
    return Held(elements, weights, gradients, state)
