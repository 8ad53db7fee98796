"""The no-GPU mends: the CUDA device is the CPU, CUDA's generator is torch's default one, streams do not exist.

megatron-core 0.16 asks for `torch.cuda.current_device()`, `device="cuda"`, CUDA random states, streams and tensor
type names unconditionally. Replacing the torch functions
is enough; only its two random-state helpers must be replaced as well, because they go through
`torch.cuda._lazy_call`, which a torch without CUDA queues forever: a silent no-op.
"""

import functools
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
FACTORIES = (
    *("empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "linspace", "rand", "randn", "randint"),
    *("randperm", "eye", "empty_like", "zeros_like", "ones_like", "full_like", "empty_strided"),
)


class NoStream:
    """A stream, an event or a range that does nothing."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __enter__(self) -> "NoStream":
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def wait_stream(self, _stream: object) -> None:
        pass

    def wait_event(self, _event: object) -> None:
        pass

    def record(self, *_args: Any) -> None:
        pass

    def record_event(self, *_args: Any) -> "NoStream":
        return NoStream()

    def synchronize(self) -> None:
        pass


def replace_cuda_calls() -> None:
    """Replace the parts of torch that megatron-core calls for a CUDA device. For processes that use no GPU."""
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    _move_factories_to_cpu()
    _keep_tensors_on_cpu()
    _remove_streams()
    _share_random_state()
    _name_types_as_cuda()
    # identity: the first torch.compile call imports inductor (7 s), and the compiled functions then ask for a GPU
    torch.compile = lambda function=None, *_, **__: function if callable(function) else (lambda f: f)  # type: ignore[assignment]


def replace_rng_access(random: ModuleType) -> None:
    """Let megatron.core.tensor_parallel.random read and set torch's default generator."""
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()  # type: ignore[attr-defined]
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)  # type: ignore[attr-defined]
    # the two generators are one here, so the warning that both changed says nothing
    quiet = logging.getLogger(random.__name__)
    quiet.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def replace_split_counts(token_dispatcher: ModuleType) -> None:
    """Counts for all_to_all become numpy arrays on the way from the GPU, which there is none; gloo wants them so."""
    original = token_dispatcher.maybe_move_tensor_to_cpu

    def counts(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and isinstance(tensor, torch.Tensor):
            return tensor.numpy()
        return original(tensor, as_numpy=as_numpy, record_stream=record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = counts  # type: ignore[attr-defined]


def replace_uneven_collectives(mappings: ModuleType) -> None:
    """Gather, reduce-scatter of parts of unequal length (tokens of experts), which gloo lacks: padded to one length."""
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(x: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(x, group, None, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        whole = gather(_with_rows(x, max(sizes)), group)
        return torch.cat([part[:n] for part, n in zip(whole.chunk(len(sizes)), sizes, strict=True)])

    def scatter_uneven(x: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter(x, group, None, use_global_buffer)
        sizes = [int(size) for size in input_split_sizes]
        padded = torch.cat([_with_rows(part, max(sizes)) for part in x.split(sizes)])
        return scatter(padded, group)[: sizes[group.rank()]].contiguous()

    mappings._gather_along_first_dim = gather_uneven  # type: ignore[attr-defined]
    mappings._reduce_scatter_along_first_dim = scatter_uneven  # type: ignore[attr-defined]


def _with_rows(x: torch.Tensor, count: int) -> torch.Tensor:
    """x [n, ...] with rows of zeros behind it: [count, ...]."""
    return torch.cat((x, x.new_zeros(count - x.shape[0], *x.shape[1:]))) if x.shape[0] < count else x


def _means_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return device.startswith("cuda") if isinstance(device, str) else False


def _move_factories_to_cpu() -> None:
    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def create(*args: Any, **kwargs: Any) -> Any:
            if _means_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return create

    # `with torch.device(...)` knows the factories by identity and collects them once: the real ones, not ours.
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _keep_tensors_on_cpu() -> None:
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    original = torch.Tensor.to

    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _means_cuda(args[0]):
            args = (CPU, *args[1:])
        if _means_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    torch.Tensor.to = to  # type: ignore[method-assign,assignment]


def _remove_streams() -> None:
    for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, _returning(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, _returning(0))
    for name in ("current_stream", "default_stream", "stream", "device", "Stream", "Event"):
        setattr(torch.cuda, name, type(name, (NoStream,), {}))
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _returning(None))
    torch.Tensor.record_stream = _returning(None)  # type: ignore[method-assign]


def _returning(value: Any) -> Callable[..., Any]:
    """A new function each time: torch._dynamo, imported later, refuses one object under two of torch's names."""
    return lambda *_, **__: value


def _share_random_state() -> None:
    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.default_generator.set_state(state)

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *_, **__: torch.default_generator.get_state()  # type: ignore[attr-defined, assignment]
        module.set_rng_state = set_state  # type: ignore[attr-defined, assignment]
    for name in ("manual_seed", "manual_seed_all"):
        setattr(torch.cuda, name, lambda value, *_, **__: torch.default_generator.manual_seed(int(value)) and None)


def _name_types_as_cuda() -> None:
    """`Tensor.type()` answers "torch.cuda.FloatTensor" to megatron-core, whose optimizers compare with that name."""
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        asked_by_megatron = "/megatron/core/" in sys._getframe(1).f_code.co_filename
        if asked_by_megatron and isinstance(answer, str) and not answer.startswith("torch.cuda."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
