"""megatron-core's data-parallel wrapper: gradients in one fp32 buffer, weights in another, cut over the ranks."""

from collections.abc import Iterator
from typing import Any

from megatron.core.distributed import DistributedDataParallel, param_and_grad_buffer
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

_REDUCE_SCATTER = param_and_grad_buffer.dist_reduce_scatter_func


class DataParallel(DistributedDataParallel):
    """Without its two collectives where there is one data-parallel rank.

    A reduce-scatter and an all-gather over one rank change nothing, but gloo copies both buffers for them: 3 % of a
    step of a 10M model on a CPU.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # reduce_scatter_with_fp32_accumulation replaces it for the whole process: the next run would have it unasked
        param_and_grad_buffer.dist_reduce_scatter_func = _REDUCE_SCATTER
        super().__init__(*args, **kwargs)

    @property
    def _has_replicas(self) -> bool:
        """Of dense parameters or of experts, which may have some where the dense ones have none."""
        experts = self.intra_expt_dp_group.size() if self.expert_parallel_buffers else 1
        return max(int(self.dp_cp_group.size()), int(experts)) > 1

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Sum gradients over data-parallel ranks."""
        if self._has_replicas:
            super().finish_grad_sync(force_all_reduce=force_all_reduce)

    def start_param_sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather updated weights from data-parallel ranks."""
        if self._has_replicas:
            super().start_param_sync(*args, **kwargs)

    def enable_forward_pre_hook(self) -> None:
        """With overlap_param_gather: a layer waits for all of its weights before it computes.

        megatron-core has each module wait for its own parameters. That misses those that another module reads
        without calling their owner (the matrices of an adapter, a convolution's weight), which would stay as they
        were before the update; and an expert that gets no token on some rank would leave that rank out of a gather.
        """
        for module in _units(self.module):
            self.remove_forward_pre_hook_handles[module] = module.register_forward_pre_hook(self._gathering(module))

    def _gathering(self, unit: nn.Module) -> Any:
        """A hook that finishes the gathers of every parameter in `unit`."""
        mine = (self.param_to_bucket_group.get(parameter) for parameter in unit.parameters())
        groups = list(dict.fromkeys(group for group in mine if group is not None))

        def finish(*_: Any) -> None:
            for group in groups:
                group.finish_param_sync()

        return finish

    def let_go(self) -> None:
        """Drop the hooks on autograd's accumulators and what token dispatchers keep of the last forward.

        They hold the model where Python's collector does not look.
        """
        self.grad_accs.clear()
        for module in self.modules():
            dispatcher = getattr(module, "token_dispatcher", None)
            kept = vars(dispatcher) if dispatcher is not None else {}
            for name, value in kept.items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    kept[name] = None


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """The layers, and outside of them every module that has parameters of its own."""
    layers = list(get_attr_wrapped_model(model, "decoder").layers)
    inside = {part for layer in layers for part in layer.modules()}
    yield from layers
    for module in model.modules():
        if module not in inside and any(True for _ in module.parameters(recurse=False)):
            yield module
