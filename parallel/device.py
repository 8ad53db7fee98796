"""The one seam for CPU, GPU and a missing Transformer Engine.

`prepare` is called once, explicitly, before anything imports megatron.core. Nothing happens at import.
"""

import torch

from mswift.errors import ConfigError
from mswift.launchers.environment import current, only_own_gpus

_PEAK_FLOPS = {  # dense, without sparsity, from the vendors' data sheets; by part of the device name
    "BF16": {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12},
    "F32": {"H100 PCIe": 51e12, "H100": 67e12, "H200": 67e12, "B200": 75e12, "A100": 19.5e12, "L40S": 91.6e12},
}


def resolve(device: str = "auto") -> torch.device:
    """The device that `--device` means for this process (of several GPUs the one with its local rank). Changes nothing.

    Raises ConfigError for cuda on a machine without a GPU and for an unknown name.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: not known; use --device auto, cpu or cuda")
    if device == "cpu" or (device == "auto" and not _has_gpu()):
        return torch.device("cpu")
    if not _has_gpu():
        raise ConfigError("--device cuda: torch sees 0 GPUs here; use --device cpu (or auto)")
    info, count = current(), torch.cuda.device_count()
    local_rank = info.local_rank if info and not only_own_gpus() else 0
    if local_rank >= count:
        raise ConfigError(
            f"--nproc_per_node: process {local_rank} has no GPU of its own, torch sees {count} here: "
            f"use --nproc_per_node {count} (SLURM: --ntasks-per-node={count}, or as many --gpus-per-node as tasks)"
        )
    return torch.device("cuda", local_rank)


def prepare(device: str = "auto") -> torch.device:
    """Choose the device and mend what megatron-core lacks on it; to be called before megatron.core is imported.

    Two groups of mends, both refusing a megatron-core that they were not tested with (ConfigError):
    *no GPU*, only on a CPU device, replaces the CUDA calls that megatron-core makes unconditionally;
    *no Transformer Engine*, on any device, hides Transformer Engine and apex (`sys.modules[...] = None`),
    because only the PyTorch backend exists: every process computes the same thing whether they are installed
    or not. A second call for the same device changes nothing.
    """
    from mswift.parallel.megatron import mends

    mends.apply(on_gpu=resolve(device).type == "cuda")
    return choose(device)


def choose(device: str = "auto") -> torch.device:
    """The device of this process from here on, for an engine without megatron-core."""
    chosen = resolve(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def backend(device: torch.device) -> str:
    """torch.distributed backend for tensors on this device."""
    return "nccl" if device.type == "cuda" else "gloo"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it (a CPU has)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Dense peak in FLOP/s for dtype "BF16" or "F32", or None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = _PEAK_FLOPS.get(dtype, {})
    return next((known[part] for part in sorted(known, key=len, reverse=True) if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory this process has held: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _has_gpu() -> bool:
    """torch.cuda.is_available() of the real torch; the no-GPU mends leave that function alone."""
    return torch.cuda.is_available()
