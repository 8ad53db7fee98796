"""Which PEFT adapters vLLM serves as they are; others are refused with the reason before a start. Torch-free."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mswift.converters.io.safetensors import read_header
from mswift.errors import ConfigError
from mswift.tuners.peft_config import WEIGHTS_FILE, read_peft_config
from mswift.tuners.settings import PeftSettings

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Sizes that vLLM sets aside for adapters; a smaller adapter fits into the next one."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def lora_options(adapters: Mapping[str, Path], base: Mapping[str, Any], *, on_cpu: bool) -> dict[str, Any]:
    """vLLM's options for these adapters, {} for none. Raises ConfigError for one that it would not serve rightly.

    base: config.json of the model.
    """
    if not adapters:
        return {}
    largest = max(check_vllm_adapter(path) for path in adapters.values())
    if on_cpu and any(base.get(name) for name in _EXPERTS):  # LORA_BESIDE_EXPERTS
        raise _refusal(
            next(iter(adapters.values())),
            "builds for the CPU have no adapters on models with experts",
        )
    slots = len(adapters) + on_cpu  # BASE_BESIDE_ADAPTERS
    return {"enable_lora": True, "max_lora_rank": _room(largest), "max_loras": slots}


def check_vllm_adapter(path: Path) -> int:
    """The largest rank of an adapter that vLLM serves; ConfigError with the reason for any other."""
    settings = read_peft_config(path)
    reason = _settings_reason(settings) or _tensors_reason(sorted(read_header(path / WEIGHTS_FILE)))
    if reason:
        raise _refusal(path, reason)
    return max(settings.rank, *settings.rank_pattern.values(), 1)


def _refusal(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"--adapters {path}: vLLM does not serve it: {reason}; fold it into a copy of its base: mswift merge "
        f"--model BASE --adapters {path} --output_dir MERGED"
    )


def _settings_reason(settings: PeftSettings) -> str:
    if settings.dora:
        return "it is a DoRA"
    if settings.modules_to_save:
        return f"it replaces {', '.join(settings.modules_to_save)} (modules_to_save)"
    if settings.lora_bias:
        return "its adapters have biases"
    return ""


def _tensors_reason(names: list[str]) -> str:
    experts = [name for name in names if ".experts" in name]
    if experts:
        return f"it adapts experts ({experts[0]})"
    absorbed = [name for name in names if ".kv_b_proj." in name]
    if absorbed:  # KV_B_ADAPTERS
        return f"it adapts {absorbed[0].partition('.lora_')[0]}, which its latent attention reads without adapters"
    other = [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    return f"it holds {other[0]}, which is neither A nor B of a linear" if other else ""


def _room(rank: int) -> int:
    for size in _RANKS:
        if rank <= size:
            return size
    raise ConfigError(f"an adapter has rank {rank}: vLLM serves up to {_RANKS[-1]}; fold it in with mswift merge")
