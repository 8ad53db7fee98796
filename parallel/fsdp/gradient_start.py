"""LoRA-GA (`mswift.tuners.data_start`) over all ranks of a job: A and B from the gradients of whole weights.

Shapes: o, i features of a linear, b rows, s positions.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mswift.errors import ConfigError
from mswift.parallel.batch import Microbatch
from mswift.parallel.fsdp.lora_start import drawn_from, linears, start_in_weights
from mswift.parallel.fsdp.passes import Passed, Passes
from mswift.parallel.fsdp.weights import RankWeights
from mswift.tuners.data_start import DataStart, gradient_factors
from mswift.tuners.lora import Adapted


def start_from_gradients(
    weights: RankWeights,
    passes: Passes,
    of: Mapping[str, Adapted],
    layers: Mapping[str, Any],
    steps: Sequence[Sequence[Microbatch]],
    how: DataStart,
    seed: int,
    around: Callable[[bool], AbstractContextManager[None]],
) -> None:
    """Fill A, B and their starts; layers: by name. ConfigError, on all ranks, where loss or gradient is not finite."""
    gradients = _Gradients(of)
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(gradients.hook(name)).remove)
        for number, step in enumerate(steps, 1):
            done = passes.train(step, 0, None, around)
            for parameter in weights.parameters.values():
                parameter.grad = None
            if not passes.all_finite(done.loss, *gradients.largest()):
                raise _not_finite(done, f"global batch {number} of {len(steps)}")

    def factors(name: str, adapted: Adapted, weight: Tensor) -> tuple[Tensor, Tensor]:
        mean = gradients.sums.pop(adapted.name) / len(steps)
        return gradient_factors(weight, mean, adapted, how, drawn_from(seed, name))

    start_in_weights(weights.parameters, weights.tuned.base, of, factors)


def _not_finite(done: Passed, where: str) -> ConfigError:
    if not done.weight_sum:
        return ConfigError(
            f"--init_weights lora_ga: no token of {where} is learned, so it has no gradient: use more data at a time "
            "(--global_batch_size), or start without data (--init_weights true)"
        )
    return ConfigError(
        f"--init_weights lora_ga: loss ({done.loss}) or gradients of {where} are not finite: the weights of --model "
        "are broken, or overflow in this dtype (--torch_dtype)"
    )


class _Gradients:
    """`sums` [o, i] fp32 of the gradients of those linears that are this rank's."""

    def __init__(self, of: Mapping[str, Adapted]) -> None:
        self._rank, world = dist.get_rank(), dist.get_world_size()
        self._owner = {adapted.name: n % world for n, (_, adapted) in enumerate(linears(of))}
        self.sums: dict[str, Tensor] = {}

    def hook(self, name: str) -> Callable[..., Tensor]:
        """A forward hook of the layer with this name, whose output is a tensor of its own."""

        def see(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                return output
            seen: Tensor = _Seen.apply(output, inputs[0], lambda x, gradient: self._add(name, x, gradient))
            return seen

        return see

    def _add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """x [b, s, i] and the gradient of the linear's output [b, s, o] of this rank; or [b s, i] and [b s, o]."""
        rows, columns = (each.reshape(-1, each.shape[-1]).float() for each in (gradient, x))
        of_weight = rows.T @ columns
        dist.reduce(of_weight, self._owner[name])
        if self._owner[name] == self._rank:
            self.sums[name] = self.sums[name].add_(of_weight) if name in self.sums else of_weight

    def largest(self) -> list[float]:
        """Of each sum, without its sign; not finite where an element is not."""
        return [float(total.abs().max()) for total in self.sums.values()]


class _Seen(torch.autograd.Function):
    """An output as it is; in the backward pass `tell` gets x and the output's gradient.

    Autograd keeps x, so that a layer that is computed again lets go of it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, tell: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tell = tell
        ctx.mark_dirty(output)  # else it comes back as a view, which a model could not change in place
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.tell(x, gradient)
        return gradient, None, None
